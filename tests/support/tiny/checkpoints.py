"""Small checkpoints on disk: HF directories, GGUF files of several families, and one with a planted spike."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from tests.support.cached_forward import cached_forward

BOS, EOS = 0, 1
"""Ids of `<s>` and `</s>` in the byte tokenizer; BOS is 0 on purpose, because 0 is falsy."""

VOCAB = 258


def token_of(character: str) -> int:
    """Return the byte tokenizer's id of an ASCII character."""
    return byte_tokenizer().token_to_id(_byte_letters()[ord(character)])


def _byte_letters() -> list[str]:
    """Return the letter that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = {byte: chr(byte) for byte in visible} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}
    return [letters[byte] for byte in range(256)]


def byte_tokenizer() -> Tokenizer:
    """One token per byte, in byte order after `<s>` and `</s>`."""
    vocabulary = {"<s>": BOS, "</s>": EOS} | {letter: byte + 2 for byte, letter in enumerate(_byte_letters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def tiny_config(**changes: Any) -> LlamaConfig:
    """GQA 4/2, head_dim 16, hidden 64, intermediate 96 (multiples of 32, as GGUF's blocks need), three layers."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "initializer_range": 0.15,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    return LlamaConfig(**(settings | changes))


def random_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Return transformers' model with random weights, norms and biases included."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_config(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval().requires_grad_(False)


def random_decoder(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """Return transformers' model of a family with random weights; sizes as `tiny_config`, a window of 8.

    Seven layers, so that Gemma 3's sixth sees everything. Logits are large enough for Gemma 2's cap to matter.
    """
    torch.manual_seed(seed)
    sizes = tiny_config().to_dict()
    kept = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "initializer_range")
    settings: dict[str, Any] = {name: sizes[name] for name in kept} | {
        "vocab_size": len(PIECES) if "gemma" in model_type else VOCAB,
        "num_hidden_layers": 7,
        "head_dim": 32,  # not hidden / heads
        "max_position_embeddings": 256,
        "query_pre_attn_scalar": 32,
        "sliding_window": 8,
    }
    settings |= {"head_dim": 16} if model_type in ("llama", "qwen2") else {}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(settings | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval().requires_grad_(False)


def state(model: Any) -> dict[str, torch.Tensor]:
    """Return the tensors a checkpoint holds: a tied head only once, under the embedding's name."""
    tied = model.config.tie_word_embeddings
    return {name: value for name, value in model.state_dict().items() if not (tied and name == "lm_head.weight")}


def write_config(folder: Path, model: LlamaForCausalLM) -> None:
    """Write config.json as transformers does."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))


def write_tokenizer(folder: Path, bos: str | None = "<s>", eos: str | None = "</s>") -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    special = {"bos_token": bos, "eos_token": eos}
    settings = {name: token for name, token in special.items() if token is not None}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 256} | settings)
    )


def write_weights(folder: Path, tensors: Mapping[str, torch.Tensor], shards: int = 1) -> None:
    """Write safetensors: one file, or several with an index, each holding every n-th tensor."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        names = list(contiguous)[shard::shards]
        save_file({name: contiguous[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_hf(folder: Path, model: LlamaForCausalLM, *, shards: int = 1, dtype: torch.dtype = torch.float32) -> Path:
    """Write an HF directory; return it."""
    write_config(folder, model)
    write_tokenizer(folder)
    write_weights(folder, {name: tensor.to(dtype) for name, tensor in state(model).items()}, shards)
    return folder


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""HF → GGUF, inside a layer or outside; from llama.cpp's documentation, not from the code under test."""

SANDWICH_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
"""What differs where norms stand on both sides of a block."""


@dataclass(frozen=True)
class GgufLayout:
    """What llama.cpp's converter does to a family."""

    architecture: str
    names: Mapping[str, str] = field(default_factory=lambda: GGUF_NAMES)
    norm_offset: float = 0.0
    permuted: bool = False


GGUF_LAYOUTS = {
    "llama": GgufLayout("llama", permuted=True),
    "qwen2": GgufLayout("qwen2"),
    "qwen3": GgufLayout("qwen3"),
    "gemma": GgufLayout("gemma", norm_offset=1.0),
    "gemma2": GgufLayout("gemma2", GGUF_NAMES | SANDWICH_NAMES, norm_offset=1.0),
    "gemma3_text": GgufLayout("gemma3", GGUF_NAMES | SANDWICH_NAMES, norm_offset=1.0),
}
"""HF's model type → layout; from llama.cpp's converter."""


def gguf_name(name: str, names: Mapping[str, str] = GGUF_NAMES) -> str:
    """Return GGUF's name of an HF tensor."""
    stem, suffix = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, module = stem.split(".", 3)
        return f"blk.{layer}.{names[module]}.{suffix}"
    return f"{names[stem]}.{suffix}"


# A sentencepiece vocabulary in Gemma's order: control (type 3), user-defined (4), bytes (6), then pieces (1).
_CONTROL, _USER_DEFINED = ("<pad>", "<eos>", "<bos>", "<unk>"), ("\n", "\n\n", "  ")
_LEARNED = ("he", "ll", "llo", "hello", "\u2581", *"abcdefghijklmnopqrstuvwxyz")
PIECES = (*_CONTROL, *_USER_DEFINED, *(f"<0x{byte:02X}>" for byte in range(256)), *_LEARNED)
PIECE_TYPES = [3] * len(_CONTROL) + [4] * len(_USER_DEFINED) + [6] * 256 + [1] * len(_LEARNED)


def _add_sentencepiece(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_token_list(list(PIECES))
    writer.add_token_types(PIECE_TYPES)
    learned = len(PIECES) - len(_LEARNED)
    writer.add_token_scores([-1000.0] * learned + [-float(rank) for rank in range(len(_LEARNED))])
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)


def _add_byte_level(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    vocabulary = sorted(byte_tokenizer().get_vocab().items(), key=lambda item: item[1])
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if token in ("<s>", "</s>") else 1 for token, _ in vocabulary])
    writer.add_token_scores([0.0] * len(vocabulary))  # from which transformers finds the merges: none
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)


def llama_cpp_permuted(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Return query/key rows as llama.cpp stores them: of each head, row i of the first half, then of the second."""
    half = weight.shape[0] // heads // 2
    order = [head * 2 * half + i + part * half for head in range(heads) for i in range(half) for part in (0, 1)]
    return np.ascontiguousarray(weight[order])


@dataclass(frozen=True)
class WrittenGguf:
    """A GGUF file and what must be read from it: HF name → values after the file's own rounding."""

    path: Path
    expected: Mapping[str, NDArray[np.float32]]


def write_gguf(
    path: Path,
    model: Any,
    *,
    architecture: str | None = None,
    extra: Mapping[str, int | str | float | list[bool]] | None = None,
    tensors: Mapping[str, NDArray[Any] | None] | None = None,
) -> WrittenGguf:
    """Write a file as llama.cpp's converter would: matrices Q8_0 but the embedding F16, vectors F32.

    Args:
        path: Where to.
        model: transformers' model of a family in `GGUF_LAYOUTS`.
        architecture: Another name than the family's.
        extra: Metadata to add.
        tensors: By GGUF name: tensors to add or to put in the place of the model's; None leaves one out.
    """
    config, layout = model.config, GGUF_LAYOUTS[model.config.model_type]
    writer = gguf.GGUFWriter(path, architecture or layout.architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if config.model_type != "qwen2":  # whose heads always share the hidden size
        writer.add_key_length(config.head_dim)
    if config.model_type in ("gemma2", "gemma3_text"):
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    for key, value in (extra or {}).items():
        kinds = {
            str: writer.add_string,
            int: writer.add_uint32,
            float: writer.add_float32,
            list: writer.add_array,
        }
        kinds[type(value)](key, value)
    add_tokenizer = _add_sentencepiece if "gemma" in config.model_type else _add_byte_level
    add_tokenizer(writer)
    replaced = dict(tensors or {})
    expected = {}
    for name, tensor in state(model).items():
        values = tensor.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        kind = gguf.GGMLQuantizationType.F32
        if values.ndim == 2:
            q8, f16 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F16
            kind = f16 if "embed" in name else q8
        stored = llama_cpp_permuted(values, heads) if heads and layout.permuted else values
        # A row's rounding does not depend on where the row stands, so the expectation needs no permutation.
        expected[name] = values if values.ndim == 1 else gguf.dequantize(gguf.quantize(values, kind), kind)
        if name.endswith("norm.weight"):
            stored = values + np.float32(layout.norm_offset)
            expected[name] = stored - np.float32(layout.norm_offset)
        data = stored if values.ndim == 1 else gguf.quantize(stored, kind)
        if gguf_name(name, layout.names) not in replaced:
            writer.add_tensor(gguf_name(name, layout.names), data, raw_dtype=kind)
    for name, values in replaced.items():
        if values is not None:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return WrittenGguf(path, expected)


SPIKING_CHARACTER = "\n"
PLANTED_LAYER = 1
PLANTED_MODULE = f"model.layers.{PLANTED_LAYER}.mlp.down_proj"
PLANTED_CHANNEL = 5

# Hidden channels that belong to the planted spike alone.
_IS_SPIKING, _IS_BOS, _SEEN = 0, 1, 2
_RESERVED = 3


def planted_spike_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    r"""Return a random model in which `\n` spikes at one channel of one down_proj's input, the first time only.

    One hidden channel marks `\n`, one marks BOS. Head 0 of layer 0 lets `\n` look at BOS and at every `\n` so far,
    all equally: BOS gets 1/2 of the attention at the first `\n`, 1/3 at the second. What it gets is written to a
    third channel. In layer 1 one gate channel opens where that exceeds 0.42, and its up channel reads the mark of
    `\n`: the product is huge at the first `\n` and nothing anywhere else.
    """
    # theta: slow enough that the last rotary pair, which the head uses, does not turn within the context.
    rope = {"rope_type": "default", "rope_theta": 1e8}
    model = random_llama(seed, initializer_range=0.1, rope_parameters=rope, rms_norm_eps=1e-6, **changes)
    decoder, marker = model.model, token_of(SPIKING_CHARACTER)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter[:_RESERVED] = 0  # nobody else writes the reserved channels
            elif parameter.shape[-1] == model.config.hidden_size and "embed" not in name:
                parameter[:, :_RESERVED] = 0  # nor reads them
        embedding = decoder.embed_tokens.weight
        embedding.normal_()
        # Every row has the same norm, so that RMSNorm scales all marks alike.
        embedding[:, :_RESERVED] = 0
        mark = 2.0
        embedding[marker, _IS_SPIKING] = embedding[BOS, _IS_BOS] = mark
        embedding[:, _RESERVED:] *= (
            (64.0 - embedding[:, :_RESERVED].square().sum(1)) / embedding[:, _RESERVED:].square().sum(1)
        ).sqrt()[:, None]
        _plant_attention(decoder.layers[0].self_attn, mark)
        _plant_spike(decoder.layers[PLANTED_LAYER].mlp)
        model.lm_head.weight[:, _RESERVED:] *= 2.0
    return model


def _plant_attention(attention: Any, mark: float) -> None:
    """Head 0: queries of the marker match keys of BOS and marker; the value is BOS's mark, written to `_SEEN`."""
    head_dim, slow = attention.head_dim, attention.head_dim - 1
    score = 16.0 * head_dim**0.5 / mark**2  # e^16 against all the tokens that do not match
    queries, keys, values = attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight
    queries[:head_dim] = 0
    queries[slow, _IS_SPIKING] = score
    # Key/value head 0 also serves query head 1, which thereby attends to everything equally.
    queries[head_dim : 2 * head_dim] = 0
    keys[:head_dim] = 0
    keys[slow, [_IS_SPIKING, _IS_BOS]] = 1.0
    values[0] = 0
    values[0, _IS_BOS] = 1.0
    attention.o_proj.weight[:, [0, head_dim]] = 0
    attention.o_proj.weight[_SEEN, :] = 0
    attention.o_proj.weight[_SEEN, 0] = 1.0


def _plant_spike(mlp: Any) -> None:
    gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
    gate[PLANTED_CHANNEL] = up[PLANTED_CHANNEL] = 0
    gate[PLANTED_CHANNEL, _SEEN] = 300.0
    gate[PLANTED_CHANNEL, _IS_SPIKING] = -300.0 * 0.42
    up[PLANTED_CHANNEL, _IS_SPIKING] = 40.0
    down[:] *= 3.0  # the layer matters: losing it to a coarse step shows in the perplexity
    down[:, PLANTED_CHANNEL] *= 1e-3


def sampled_text(model: LlamaForCausalLM, lines: int = 64, line_length: int = 48, seed: int = 0) -> NDArray[np.int64]:
    r"""Return [lines, line_length] content tokens that the model itself says after BOS, letters and spaces only.

    Every 12th token is `\n`. On text drawn from a model no other model is better, so that whatever quantization
    changes costs perplexity.
    """
    allowed = torch.tensor([token_of(letter) for letter in "abcdefghijklmnopqrstuvwxyz "])
    generator = torch.Generator().manual_seed(seed)
    step = torch.full((lines, 1), BOS)
    content, cache = [], DynamicCache()
    with torch.inference_mode():
        for position in range(line_length):
            logits = cached_forward(model, step, cache)[:, -1, allowed]
            if position % 12 == 7:
                step = torch.full((lines, 1), token_of(SPIKING_CHARACTER))
            else:
                step = allowed[torch.multinomial(torch.softmax(logits, dim=-1), 1, generator=generator)]
            content.append(step)
    return torch.cat(content, dim=1).numpy()


def as_text(tokens: NDArray[np.int64]) -> str:
    """Return tokens, row after row, as the text whose tokens they are."""
    return bytes((tokens - 2).ravel().tolist()).decode("ascii")
