"""What a decoder looks like: sizes, rope, window, read from an HF `config.json` and validated."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spike_export.calibration.errors import CheckpointError, one_line


@dataclass(frozen=True, slots=True)
class Family:
    """How a model family differs from plain LLaMA.

    Attributes:
        model_type: HF's `model_type`.
        sliding_window: Whether the family's attention obeys `config.sliding_window`.
    """

    model_type: str
    sliding_window: bool


# LLaMA-2/3, SOLAR and SmolLM2 all call themselves "llama" in their config.json.
FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", sliding_window=False),
    "mistral": Family("mistral", sliding_window=True),
}

ROPE_TYPES = ("default", "linear", "llama3")
"""Rope kinds that a position alone determines, so that one constant table serves every length."""

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "rms_norm_eps",
)


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only GLU transformer, in HF's terms.

    Attributes:
        family: The family's table row.
        hf: HF's configuration, normalized by transformers (rope under `rope_parameters`), as plain values.
        num_key_value_heads: Key/value heads; query heads are a multiple of it (GQA).
        head_dim: Channels per head.
        sliding_window: Number of positions a token sees, itself included, or None for all.
        bos_token_id: Beginning-of-sequence id, or None when the model has none.
    """

    family: Family
    hf: Mapping[str, Any]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    sliding_window: int | None
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]


def decoder_config(raw: Mapping[str, Any], place: str) -> DecoderConfig:
    """Validate an HF configuration.

    Args:
        raw: The content of `config.json`.
        place: What to name in an error, e.g. the file's path.

    Raises:
        CheckpointError: The architecture, its activation or its rope kind is not supported, or a key is missing.
    """
    family = _family(raw, place)
    missing = [key for key in _REQUIRED if raw.get(key) is None]
    if missing:
        raise CheckpointError(f"{place}: missing {', '.join(missing)}; is this the model's own config.json?")
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise CheckpointError(f"{place}: hidden_act is {activation!r}; supported for {family.model_type}: silu")
    _check_sizes(raw, place)
    # Imported here: transformers takes a second, and `--help` must not.
    from transformers import AutoConfig

    settings = {key: value for key, value in raw.items() if key not in ("model_type", "torch_dtype", "dtype")}
    try:
        hf = AutoConfig.for_model(family.model_type, **settings)
    except Exception as error:  # whatever a damaged file makes transformers raise
        raise CheckpointError(f"{place}: transformers refuses this configuration: {one_line(error)}") from error
    rope_type = (hf.rope_parameters or {}).get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise CheckpointError(f"{place}: rope type {rope_type!r} is not supported (supported: {', '.join(ROPE_TYPES)})")
    eos = hf.eos_token_id
    return DecoderConfig(
        family=family,
        hf=hf.to_dict(),
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_hidden_layers=hf.num_hidden_layers,
        num_attention_heads=hf.num_attention_heads,
        num_key_value_heads=hf.num_key_value_heads,
        head_dim=hf.head_dim or hf.hidden_size // hf.num_attention_heads,
        rms_norm_eps=hf.rms_norm_eps,
        max_position_embeddings=hf.max_position_embeddings,
        sliding_window=hf.sliding_window if family.sliding_window else None,
        tie_word_embeddings=hf.tie_word_embeddings,
        attention_bias=bool(getattr(hf, "attention_bias", False)),
        mlp_bias=bool(getattr(hf, "mlp_bias", False)),
        bos_token_id=hf.bos_token_id,
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
    )


def _check_sizes(raw: Mapping[str, Any], place: str) -> None:
    """Refuse sizes that are none, or that contradict each other."""
    for key in _SIZES:
        value = raw.get(key)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise CheckpointError(f"{place}: {key} is {value!r}; expected a whole number above 0: the file is damaged")
    heads, hidden = raw["num_attention_heads"], raw["hidden_size"]
    key_value = raw.get("num_key_value_heads") or heads
    if heads % key_value:
        raise CheckpointError(
            f"{place}: {heads} attention heads are not a multiple of {key_value} key/value heads; the file is damaged"
        )
    head_dim = raw.get("head_dim") or hidden // heads
    if head_dim % 2:
        raise CheckpointError(f"{place}: head_dim is {head_dim}; rotary embedding needs an even number")


def _family(raw: Mapping[str, Any], place: str) -> Family:
    model_type = str(raw.get("model_type"))
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    lacks = [key for key in _REQUIRED if key not in raw]
    detail = f"; it lacks {', '.join(lacks)} of a LLaMA-style GLU decoder" if lacks else ""
    raise CheckpointError(
        f"{place}: architecture {model_type!r} is not supported (supported: {', '.join(sorted(FAMILIES))}){detail}"
    )


def tensor_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Return every tensor the decoder needs, by HF name, with its shape.

    Linear weights are [out_features, in_features]. `lm_head.weight` is absent when tied to the embedding.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    key_value = config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    attention = {"q_proj": (heads, hidden), "k_proj": (key_value, hidden), "v_proj": (key_value, hidden)}
    attention["o_proj"] = (hidden, heads)
    mlp = {
        "gate_proj": (config.intermediate_size, hidden),
        "up_proj": (config.intermediate_size, hidden),
        "down_proj": (hidden, config.intermediate_size),
    }
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        for block, linears, bias in (
            ("self_attn", attention, config.attention_bias),
            ("mlp", mlp, config.mlp_bias),
        ):
            for linear, shape in linears.items():
                shapes[f"{layer}.{block}.{linear}.weight"] = shape
                if bias:
                    shapes[f"{layer}.{block}.{linear}.bias"] = (shape[0],)
    return shapes
