"""Checkpoints in GGUF files (LLaMA architecture): metadata become an HF configuration, tensors dequantize lazily."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spike_export.calibration.checkpoint import Checkpoint, validate_shapes
from spike_export.calibration.decoder_config import ROPE_TYPES, DecoderConfig, decoder_config, tensor_shapes
from spike_export.calibration.errors import CheckpointError, one_line
from spike_export.calibration.hf_checkpoint import hash_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# GGUF key (after "llama.") → HF key.
_CONFIG_KEYS: Mapping[str, str] = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
_TOKEN_KEYS: Mapping[str, str] = {
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}
# LLaMA 3's published rope parameters besides the factor; a GGUF file stores only their effect.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class GgufSource:
    """Tensors of a GGUF file under their HF names.

    Attributes:
        path: The file, for hashing and messages.
        tensors: HF name → gguf's tensor record (memory-mapped, in ggml's block format).
        heads: HF name of a query or key weight → its number of heads. llama.cpp stores their rows interleaved for
            its own rope; reading undoes that.
    """

    path: Path
    tensors: Mapping[str, Any]
    heads: Mapping[str, int]

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """HF tensor name → shape (GGUF lists dimensions innermost first)."""
        return {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in self.tensors.items()}

    def read(self, name: str) -> NDArray[np.float32]:
        """Read and dequantize one tensor."""
        import gguf

        record = self.tensors.get(name)
        if record is None:
            raise CheckpointError(f"{self.path}: tensor {name} is not in the file")
        try:
            values = gguf.dequantize(record.data, record.tensor_type)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path}: tensor {name}: type {record.tensor_type.name} cannot be dequantized"
            ) from error
        tensor = np.array(values, dtype=np.float32).reshape(self.shapes[name])
        heads = self.heads.get(name)
        return tensor if heads is None else rope_halves_from_pairs(tensor, heads)

    def sha256(self) -> str:
        """Hash of the file."""
        return self._sha256

    @cached_property
    def _sha256(self) -> str:
        return hash_files((self.path,))


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


def _read_file(path: Path) -> Any:
    import gguf

    # gguf warns about byte orders and unknown keys on its own logger; a damaged file raises anyway.
    logging.getLogger("gguf").setLevel(logging.ERROR)
    try:
        reader = gguf.GGUFReader(path)
        # The reader maps the file without looking at the end: touching each record finds a truncated one.
        size = path.stat().st_size
        for tensor in reader.tensors:
            if int(tensor.data_offset) + int(tensor.n_bytes) > size:
                raise ValueError(f"tensor {tensor.name} ends beyond the end of the file")
    except Exception as error:  # ValueError, IndexError, struct and numpy errors: all mean a damaged file
        raise CheckpointError(
            f"{path}: damaged or truncated GGUF file ({one_line(error)}); download it again"
        ) from error
    return reader


def _metadata(reader: Any, path: Path) -> dict[str, Any]:
    large = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.scores", "tokenizer.ggml.token_type")
    fields = {name: field.contents() for name, field in reader.fields.items() if name not in large}
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"{path}: GGUF architecture {architecture!r} is not supported (supported: llama)")
    if any(key.startswith("llama.expert") and fields[key] for key in fields):
        raise CheckpointError(f"{path}: GGUF mixture-of-experts models are not supported")
    return fields


def _hf_config(fields: Mapping[str, Any], records: Mapping[str, Any], path: Path) -> DecoderConfig:
    raw: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    for key, name in _CONFIG_KEYS.items():
        if f"llama.{key}" in fields:
            raw[name] = fields[f"llama.{key}"]
    for key, name in _TOKEN_KEYS.items():
        if key in fields:
            raw[name] = fields[key]
    if "token_embd.weight" in records:
        raw["vocab_size"] = int(records["token_embd.weight"].shape[1])
    raw["tie_word_embeddings"] = "output.weight" not in records
    raw["attention_bias"] = "blk.0.attn_q.bias" in records
    scaling = _rope_scaling(fields, records, path)
    if scaling:
        raw["rope_scaling"] = scaling
    return decoder_config(raw, str(path))


def _rope_scaling(fields: Mapping[str, Any], records: Mapping[str, Any], path: Path) -> dict[str, Any] | None:
    kind = fields.get("llama.rope.scaling.type", "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": float(fields.get("llama.rope.scaling.factor", 1.0))}
    if kind != "none":
        raise CheckpointError(f"{path}: rope type {kind!r} is not supported (supported: {', '.join(ROPE_TYPES)})")
    if "rope_freqs.weight" not in records:
        return None
    return _llama3_scaling(np.asarray(records["rope_freqs.weight"].data, np.float64), fields, path)


def _llama3_scaling(divisors: NDArray[np.float64], fields: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Recover LLaMA 3's rope factor from the per-frequency divisors that a GGUF file stores in its place.

    The divisors follow from (theta, factor) and the published constants; the factor is the largest of them. The
    formula is evaluated and compared, so that any other scaling is refused rather than approximated.
    """
    import torch
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theta = float(fields.get("llama.rope.freq_base", 10000.0))
    settings = {"rope_type": "llama3", "rope_theta": theta, "factor": float(divisors.max()), **_LLAMA3}
    config = LlamaConfig(hidden_size=2 * len(divisors), num_attention_heads=1, rope_parameters=settings)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = theta ** (-np.arange(len(divisors)) / len(divisors))
    if not np.allclose(plain / scaled.double().numpy(), divisors, rtol=1e-3):
        raise CheckpointError(f"{path}: rope_freqs.weight is not LLaMA 3's scaling; this rope is not supported")
    return {name: value for name, value in settings.items() if name != "rope_theta"}


def _hf_tensors(config: DecoderConfig, records: Mapping[str, Any]) -> dict[str, Any]:
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tensors = {}
    for name in tensor_shapes(config):
        stem, suffix = name.rsplit(".", 1)
        gguf_name = names.get_name(stem)
        record = records.get(f"{gguf_name}.{suffix}")
        if record is not None:
            tensors[name] = record
    return tensors


def _tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever a damaged vocabulary makes transformers raise
        raise CheckpointError(f"{path}: cannot load the tokenizer: {one_line(error)}") from error
    return tokenizer


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file of the LLaMA architecture.

    Raises:
        CheckpointError: The file is damaged, of another architecture, or lacks a tensor.
    """
    reader = _read_file(path)
    fields = _metadata(reader, path)
    records = {tensor.name: tensor for tensor in reader.tensors}
    config = _hf_config(fields, records, path)
    tensors = _hf_tensors(config, records)
    heads = {}
    for name in tensors:
        if ".q_proj." in name:
            heads[name] = config.num_attention_heads
        elif ".k_proj." in name:
            heads[name] = config.num_key_value_heads
    source = GgufSource(path, tensors, heads)
    validate_shapes(config, source, str(path))
    return Checkpoint(path.stem, config, source, _tokenizer(path), generation_config={})
