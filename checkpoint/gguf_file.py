"""Checkpoints in GGUF files: metadata become an HF configuration, tensors dequantize when they are asked for."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.errors import CheckpointError
from spike_export.artifacts.manifest import MOST_LAYERS
from spike_export.checkpoint.checkpoint import Checkpoint, validate_shapes
from spike_export.checkpoint.decoder_config import DecoderConfig, decoder_config, tensor_shapes
from spike_export.checkpoint.families import FAMILIES
from spike_export.checkpoint.file_hash import HashedSource
from spike_export.checkpoint.gguf_records import read_gguf
from spike_export.checkpoint.rope_frequencies import RopeScaling, frequencies
from spike_export.checkpoint.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# GGUF key (after the architecture's name) → HF key.
_CONFIG_KEYS: Mapping[str, str] = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_REQUIRED = (
    "block_count",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)
_TOKEN_KEYS: Mapping[str, str] = {
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}
_EMBEDDING = "token_embd.weight"
_THETA = 10000.0
_JOINED_ROWS = 16
"""Most rows that are dequantized as one; more leave the processor's cache."""
"""Rope base where a file names none; ggml's default, also for the sliding layers of Gemma 3."""

_ROTATED_KEYS = ("rope.dimension_count", "rope.dimension_count_swa")
"""How many channels of a head are rotated, and in layers with a sliding window; all where a file does not say."""

# LLaMA 3's published rope parameters besides the factor; a GGUF file stores only their effect.
_LLAMA3_LENGTH = 8192
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": _LLAMA3_LENGTH}
_LLAMA3_DIVISORS = "rope_freqs.weight"


@dataclass(frozen=True)
class _File:
    """What a file says.

    Attributes:
        path: For messages.
        architecture: GGUF's name, with which the model's own keys begin.
        fields: Metadata without the vocabulary.
        records: GGUF name → gguf's tensor record (memory-mapped, in ggml's block format).
    """

    path: Path
    architecture: str
    fields: Mapping[str, Any]
    records: Mapping[str, Any]

    def get(self, key: str, default: Any = None) -> Any:
        """Return one of the model's own values."""
        return self.fields.get(f"{self.architecture}.{key}", default)

    def number(self, key: str, default: float) -> float:
        """Return one of the model's own values that is a number.

        Raises:
            CheckpointError: It is of another type.
        """
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._damaged(key, value, "a number")
        return float(value)

    def size(self, key: str, default: int | None = None) -> int:
        """Return one of the model's own values that counts something.

        Raises:
            CheckpointError: It is no whole number above 0.
        """
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._damaged(key, value, "a whole number above 0")
        return value

    def _damaged(self, key: str, value: Any, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: {self.architecture}.{key} is {value!r}; expected {expected}: the file is damaged"
        )


Settings = dict[str, Any]
"""Part of an HF configuration."""


@dataclass(frozen=True, slots=True)
class _Architecture:
    """How llama.cpp's converter stores a family.

    Attributes:
        model_type: HF's `model_type`.
        settings: What the family's HF configuration holds besides `_CONFIG_KEYS`; rope always.
        tokenizer: transformers' class that reads the tokenizer.
        interleaved_rope: Whether rows of query and key weights are stored in the order of ggml's own rope.
    """

    model_type: str
    settings: Callable[[_File], Settings]
    tokenizer: str
    interleaved_rope: bool = False


@dataclass(frozen=True)
class GgufSource(HashedSource):
    """Tensors of a GGUF file under their HF names.

    Attributes:
        path: The file, for hashing and messages.
        tensors: HF name → gguf's tensor record (memory-mapped, in ggml's block format).
        heads: HF name of a query or key weight whose rows are interleaved for ggml's rope → its number of heads;
            reading undoes that.
        norm_offset: What the converter has added to the weights of norms (1 for Gemma); reading takes it off.
    """

    path: Path
    tensors: Mapping[str, Any]
    heads: Mapping[str, int]
    norm_offset: float = 0.0

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """HF tensor name → shape (GGUF lists dimensions innermost first)."""
        return {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in self.tensors.items()}

    def read(self, name: str) -> NDArray[np.float32]:
        """Read and dequantize one tensor.

        Raises:
            CheckpointError: The file has no such tensor, or gguf cannot dequantize its type.
        """
        record = self.tensors.get(name)
        if record is None:
            raise CheckpointError(f"{self.path}: tensor {name} is not in the file")
        tensor = _dequantized(record, record.data, self.path).reshape(self.shapes[name])
        if self.norm_offset and name.endswith("norm.weight"):
            tensor -= np.float32(self.norm_offset)
        heads = self.heads.get(name)
        return tensor if heads is None else rope_halves_from_pairs(tensor, heads)

    def read_rows(self, name: str, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read and dequantize some rows of a matrix: an embedding of hundreds of megabytes has only a few in use.

        Raises:
            CheckpointError: As `read`.
            IndexError: There is no such row.
        """
        if len(rows) and rows.min() < 0:
            raise IndexError(f"row {rows.min()} of {name}")
        record = self.tensors.get(name)
        if record is None or len(self.shapes[name]) != 2:  # the rows of a vector are parts of one row of the file
            return self.read(name)[rows]
        if name in self.heads:
            rows = _rows_in_pairs(rows, self.shapes[name][0] // self.heads[name])
        return _dequantized(record, record.data.reshape(self.shapes[name][0], -1)[rows], self.path)

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The file."""
        return (self.path,)


def _dequantized(record: Any, data: NDArray[Any], path: Path) -> NDArray[np.float32]:
    """Dequantize rows of a tensor; the result is a copy with the same rows."""
    import gguf

    try:
        values = gguf.dequantize(_joined_rows(data), record.tensor_type)
        return np.array(values.reshape(*data.shape[:-1], -1), dtype=np.float32)
    except NotImplementedError as error:
        raise CheckpointError(
            f"{path}: tensor {record.name}: type {record.tensor_type.name} cannot be dequantized; take a file of "
            "another type, such as Q8_0"
        ) from error


def _joined_rows(data: NDArray[Any]) -> NDArray[Any]:
    """Join rows of whole blocks, where their number allows that: gguf calls Python for every 16 rows."""
    joined = math.gcd(math.prod(data.shape[:-1]), _JOINED_ROWS)
    return data.reshape(-1, joined * data.shape[-1])


def rope_halves_from_pairs(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Reorder query/key rows from ggml's rope layout to HF's.

    ggml rotates neighbouring rows (0,1), (2,3), ... of a head; HF rotates row i with row i + head_dim/2.

    Args:
        weight: [heads * head_dim, in_features] or [heads * head_dim].
        heads: Number of query or key heads.
    """
    head_dim = weight.shape[0] // heads
    pairs = weight.reshape(heads, head_dim // 2, 2, *weight.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(weight.shape))


def _rows_in_pairs(rows: NDArray[np.int64], head_dim: int) -> NDArray[np.int64]:
    """Return where rows of `rope_halves_from_pairs` come from; a row beyond the last stays beyond it."""
    head, inner = np.divmod(rows, head_dim)
    half, pair = np.divmod(inner, head_dim // 2)
    return np.asarray(head * head_dim + 2 * pair + half, np.int64)


def _contents(path: Path) -> tuple[_Architecture, _File]:
    fields, records = read_gguf(path)
    name = str(fields.get("general.architecture"))
    if name not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise CheckpointError(f"{path}: GGUF architecture {name!r} is not supported (supported: {supported})")
    if any(key.startswith(f"{name}.expert") and fields[key] for key in fields):
        raise CheckpointError(f"{path}: GGUF mixture-of-experts models are not supported")
    parts = fields.get("split.count", 1)
    if not isinstance(parts, int):
        raise CheckpointError(f"{path}: split.count is {parts!r}; expected a whole number: the file is damaged")
    if parts > 1:
        raise CheckpointError(f"{path}: one of {parts} parts of a model; join them with llama-gguf-split --merge")
    file = _File(path, name, fields, records)
    layers = file.get("block_count", 1)
    if not isinstance(layers, int) or not 1 <= layers <= MOST_LAYERS:
        raise CheckpointError(f"{path}: {name}.block_count is {layers!r}; expected 1 to {MOST_LAYERS:,} layers")
    missing = [f"{name}.{key}" for key in _REQUIRED if file.get(key) is None]
    if _EMBEDDING not in file.records:
        missing.append(f"tensor {_EMBEDDING}")
    if missing:
        raise CheckpointError(f"{path}: missing {', '.join(missing)}; the file is not a whole model")
    if len(records[_EMBEDDING].shape) != 2:
        raise CheckpointError(f"{path}: tensor {_EMBEDDING} is no matrix; the file is damaged")
    return ARCHITECTURES[name], file


def _hf_config(architecture: _Architecture, file: _File) -> DecoderConfig:
    family = FAMILIES[architecture.model_type]
    raw: Settings = {"model_type": family.model_type, "architectures": [family.architecture]}
    raw |= {name: file.get(key) for key, name in _CONFIG_KEYS.items() if file.get(key) is not None}
    raw |= {name: file.fields[key] for key, name in _TOKEN_KEYS.items() if key in file.fields}
    # Not the key `vocab_size`, which many files lack.
    raw["vocab_size"] = int(file.records[_EMBEDDING].shape[1])
    raw["tie_word_embeddings"] = "output.weight" not in file.records
    # Where a family always has them, `attention_bias` would mean the output projection's too.
    if not family.biased:
        raw["attention_bias"] = "blk.0.attn_q.bias" in file.records
    config = decoder_config(raw | architecture.settings(file), str(file.path))
    _require_whole_rope(file, config.head_dim)
    return config


def _require_whole_rope(file: _File, head_dim: int) -> None:
    """Refuse a file whose model rotates a part of each head only: no family of `ARCHITECTURES` does in transformers."""
    for key in _ROTATED_KEYS:
        rotated = file.get(key, head_dim)
        if rotated != head_dim:
            raise CheckpointError(
                f"{file.path}: {file.architecture}.{key} is {rotated!r}, and a head has {head_dim} channels; models "
                "that rotate a part of a head are not read from GGUF files"
            )


def _rope(file: _File) -> Settings:
    """Return HF's rope parameters of the layers that see everything."""
    rope: Settings = {"rope_type": "default", "rope_theta": file.number("rope.freq_base", _THETA)}
    kind = file.get("rope.scaling.type", "none")
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": file.number("rope.scaling.factor", 1.0)}
    if kind != "none":
        raise CheckpointError(
            f"{file.path}: rope type {kind!r} is not read from GGUF files (linear and llama3 are); take the "
            f"Hugging Face directory of this model"
        )
    divisors = file.records.get(_LLAMA3_DIVISORS)
    if divisors is None:
        return rope
    return rope | _llama3_scaling(np.asarray(divisors.data, np.float64), rope["rope_theta"], file.path)


def _plain(file: _File) -> Settings:
    return {"rope_parameters": _rope(file)}


def _sliding(file: _File, period: int) -> Settings:
    """Return HF's window and which layers obey it: all but every `period`-th, unless the file says otherwise."""
    layers = int(file.get("block_count"))
    window = file.get("attention.sliding_window")
    pattern = file.get("attention.sliding_window_pattern", period)
    if not window:
        slides = [False] * layers
    elif isinstance(pattern, int) and pattern > 0:
        slides = [(index + 1) % pattern != 0 for index in range(layers)]
    elif isinstance(pattern, list) and len(pattern) == layers:
        slides = [bool(slide) for slide in pattern]
    else:
        key = f"{file.architecture}.attention.sliding_window_pattern"
        raise CheckpointError(f"{file.path}: {key} is {pattern!r}; expected a period, or one flag for each layer")
    kinds = ["sliding_attention" if slide else "full_attention" for slide in slides]
    return {"sliding_window": window or None, "layer_types": kinds}


def _query_scale(file: _File, layers_of_27b: int) -> Settings:
    """Return what queries are divided by the root of.

    No key holds it. As llama.cpp, tell the one size (27B) that does not use the head's width by its layers.
    """
    width = file.size("embedding_length") // file.size("attention.head_count")
    own = file.get("block_count") == layers_of_27b
    return {"query_pre_attn_scalar": width if own else file.size("attention.key_length", width)}


def _gemma2(file: _File) -> Settings:
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    stated = {key: file.number(key, 0.0) for key in caps if file.get(key) is not None}
    return _plain(file) | _sliding(file, 2) | _query_scale(file, 46) | stated


def _gemma3(file: _File) -> Settings:
    # Scaling, which stretches the context, is for the layers that see all of it.
    local = {"rope_type": "default", "rope_theta": file.number("rope.freq_base_swa", _THETA)}
    rope = {"rope_parameters": {"full_attention": _rope(file), "sliding_attention": local}}
    cap = file.number("final_logit_softcapping", 0.0)
    return rope | _sliding(file, 6) | _query_scale(file, 62) | ({"final_logit_softcapping": cap} if cap else {})


# Not AutoTokenizer, which takes seconds to read a configuration from the file first, and cannot for the first Gemma.
_GEMMA_TOKENIZER = "GemmaTokenizer"
_QWEN_TOKENIZER = "Qwen2Tokenizer"

ARCHITECTURES: Mapping[str, _Architecture] = {
    "llama": _Architecture("llama", _plain, tokenizer="PreTrainedTokenizerFast", interleaved_rope=True),
    "qwen2": _Architecture("qwen2", _plain, tokenizer=_QWEN_TOKENIZER),
    "qwen3": _Architecture("qwen3", _plain, tokenizer=_QWEN_TOKENIZER),
    "gemma": _Architecture("gemma", _plain, tokenizer=_GEMMA_TOKENIZER),
    "gemma2": _Architecture("gemma2", _gemma2, tokenizer=_GEMMA_TOKENIZER),
    "gemma3": _Architecture("gemma3_text", _gemma3, tokenizer=_GEMMA_TOKENIZER),
}
"""GGUF's `general.architecture` → how it is read."""


def _llama3_scaling(divisors: NDArray[np.float64], theta: float, path: Path) -> Settings:
    """Recover LLaMA 3's rope factor from the per-frequency divisors that a GGUF file stores in its place.

    The divisors follow from (theta, factor) and the published constants; the factor is the largest of them. The
    formula is evaluated and compared, so that any other scaling is refused rather than approximated.
    """
    if divisors.ndim != 1 or not (np.isfinite(divisors) & (divisors > 0)).all():
        raise CheckpointError(f"{path}: {_LLAMA3_DIVISORS} holds no divisors of frequencies; the file is damaged")
    settings = {"rope_type": "llama3", "rope_theta": theta, "factor": float(divisors.max()), **_LLAMA3}
    plain = theta ** (-np.arange(len(divisors)) / len(divisors))
    try:
        scaled = frequencies(RopeScaling(settings, 2 * len(divisors), _LLAMA3_LENGTH), _LLAMA3_LENGTH)
        known = np.allclose(plain / scaled.inverse.double().numpy(), divisors, rtol=1e-3)
    except ValueError:
        known = False
    if not known:
        raise CheckpointError(f"{path}: rope_freqs.weight is not LLaMA 3's scaling; this rope is not supported")
    return settings


def _hf_tensors(config: DecoderConfig, file: _File) -> dict[str, Any]:
    """Return HF name → record.

    Raises:
        CheckpointError: The file holds a tensor that the model would be computed without, or one whose type gguf
            cannot dequantize.
    """
    import gguf

    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == file.architecture)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tensors = {}
    for name in tensor_shapes(config):
        stem, suffix = name.rsplit(".", 1)
        record = file.records.get(f"{names.get_name(stem)}.{suffix}")
        if record is not None:
            tensors[name] = record
    unused = file.records.keys() - {record.name for record in tensors.values()} - {_LLAMA3_DIVISORS}
    if unused:
        more = f" (and {len(unused) - 1} more)" if len(unused) > 1 else ""
        raise CheckpointError(
            f"{file.path}: tensor {min(unused)}{more} is not part of a {file.architecture} model as supported here"
        )
    for record in {record.tensor_type: record for record in tensors.values()}.values():
        _dequantized(record, record.data[:1], file.path)
    return tensors


def _tokenizer(architecture: _Architecture, path: Path) -> "PreTrainedTokenizerBase":
    import transformers
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    load = partial(
        getattr(transformers, architecture.tokenizer).from_pretrained,
        path.parent,
        gguf_file=path.name,
        local_files_only=True,
        trust_remote_code=False,
    )
    return load_tokenizer(load, path, CheckpointError)


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file of one of `ARCHITECTURES`.

    Raises:
        CheckpointError: The file is damaged, one part of several, of another architecture, lacks a tensor, or holds
            one that cannot be read.
    """
    architecture, file = _contents(path)
    config = _hf_config(architecture, file)
    tensors = _hf_tensors(config, file)
    heads = {}
    if architecture.interleaved_rope:
        counts = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        heads = {name: counts[linear] for name in tensors if (linear := name.split(".")[-2]) in counts}
    source = GgufSource(path, tensors, heads, config.family.norm_offset)
    validate_shapes(config, source, str(path))
    return Checkpoint(path.stem, config, source, _tokenizer(architecture, path), generation_config={})
