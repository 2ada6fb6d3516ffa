"""What a decoder looks like: sizes, rope, window, read from an HF `config.json` and validated."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from spike_export.artifacts.errors import CheckpointError, one_line
from spike_export.artifacts.manifest import MOST_LAYERS
from spike_export.checkpoint.factors import Factors, positive
from spike_export.checkpoint.families import FAMILIES, Experts, Family
from spike_export.checkpoint.rope_frequencies import ROPE_TYPES, RopeScaling, frequencies

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

_EXPERT_COUNTS = ("num_local_experts", "num_experts", "num_experts_per_tok")

_LARGEST: Mapping[str, int] = {
    "num_hidden_layers": MOST_LAYERS,
    "max_position_embeddings": 1 << 25,
    **dict.fromkeys(_EXPERT_COUNTS, 1 << 14),
}
"""Counts beyond those of any model: tables and lists of names are made by them. Other sizes end at 2^31 - 1."""

_LARGEST_SIZE = (1 << 31) - 1

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
        num_experts: Experts of the feed-forward block; 0 without a mixture of experts.
        experts_per_token: Experts that the router picks for a token.
        expert_size: An expert's inner channels.
        renormalized_routing: Whether the picked experts' shares are divided by their sum.
        factors: What the family scales by.
        biased: Linears of a layer that have a bias.
        bos_token_id: Beginning-of-sequence id, or None when the model has none.
        hadamard_block: Channels of a block of the Hadamard transform in front of `down_proj`; None without one. No
            checkpoint has it: an equivalent model may.
        input_hadamard: Input of a block, by its representative's HF name → channels of a block of the Hadamard
            transform that it passes; an equivalent model's as well.
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
    num_experts: int
    experts_per_token: int
    expert_size: int
    renormalized_routing: bool
    factors: Factors
    biased: frozenset[str]
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    hadamard_block: int | None = None
    input_hadamard: Mapping[str, int] = field(default_factory=dict)

    @property
    def inner_size(self) -> int:
        """Channels inside the feed-forward block, or inside an expert of one: what `down_proj` reads."""
        return self.expert_size if self.num_experts else self.intermediate_size

    def layer_window(self, index: int) -> int | None:
        """Return how many positions a token of layer `index` sees, itself included, or None for all."""
        kinds = self.hf.get("layer_types")
        return self.sliding_window if not kinds or kinds[index] == "sliding_attention" else None

    def layer_rope(self, index: int) -> str | None:
        """Return the kind of layer whose rope layer `index` has, or None where all layers have the same."""
        nested = any(isinstance(value, Mapping) for value in self.hf["rope_parameters"].values())
        return str(self.hf["layer_types"][index]) if nested else None

    @property
    def ropes(self) -> tuple[str | None, ...]:
        """The kinds of layers that have ropes of their own, in the order of their first layers."""
        return tuple(dict.fromkeys(self.layer_rope(index) for index in range(self.num_hidden_layers)))

    def rope(self, kind: str | None) -> RopeScaling:
        """Return the rope that layers of this kind have."""
        parameters: Mapping[str, Any] = self.hf["rope_parameters"]
        return RopeScaling(
            parameters if kind is None else parameters[kind], self.head_dim, self.max_position_embeddings
        )

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The windows that occur, in the order of their first layers."""
        return tuple(dict.fromkeys(self.layer_window(index) for index in range(self.num_hidden_layers)))


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
    _check_activation(family, raw, place)
    _check_sizes(raw, place)
    # Imported here: transformers takes a second, and `--help` must not.
    from transformers import AutoConfig
    from transformers.utils import logging

    # What it would warn of, such as a rope that it does not know, is refused below, in one line.
    logging.set_verbosity_error()
    settings = {key: value for key, value in raw.items() if key not in ("model_type", "torch_dtype", "dtype")}
    try:
        hf = AutoConfig.for_model(family.model_type, **settings)
    except Exception as error:  # whatever a damaged file makes transformers raise
        raise CheckpointError(f"{place}: transformers refuses this configuration: {one_line(error)}") from error
    if getattr(hf, "use_bidirectional_attention", False):
        raise CheckpointError(
            f"{place}: its attention is bidirectional (an embedding model); only text generators are supported"
        )
    ends = hf.eos_token_id if isinstance(hf.eos_token_id, list) else [hf.eos_token_id]
    try:
        factors, epsilon = family.factors(hf.to_dict()), positive(hf.to_dict(), "rms_norm_eps")
    except ValueError as error:
        raise CheckpointError(f"{place}: {error}: the file is damaged") from error
    config = DecoderConfig(
        family=family,
        hf=hf.to_dict(),
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_hidden_layers=hf.num_hidden_layers,
        num_attention_heads=hf.num_attention_heads,
        num_key_value_heads=hf.num_key_value_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        rms_norm_eps=epsilon,
        max_position_embeddings=hf.max_position_embeddings,
        sliding_window=_window(hf.sliding_window, place) if family.sliding_window else None,
        tie_word_embeddings=hf.tie_word_embeddings,
        **_mixture(family.experts, hf, place),
        factors=factors,
        biased=_biased(family, hf),
        bos_token_id=_token_id(hf.bos_token_id, place),
        eos_token_ids=tuple(end for each in ends if (end := _token_id(each, place)) is not None),
    )
    _check_layered_ropes(config, place)
    for kind in config.ropes:
        _check_rope(config, kind, place)
    return config


def _token_id(value: Any, place: str) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise CheckpointError(f"{place}: a special token's id is {value!r}; expected a whole number or null")
    return value


def _window(positions: Any, place: str) -> int | None:
    if positions is None:
        return None
    if not isinstance(positions, int) or isinstance(positions, bool) or not 1 <= positions <= _LARGEST_SIZE:
        raise CheckpointError(
            f"{place}: sliding_window is {positions!r}; expected a whole number from 1 to {_LARGEST_SIZE:,}, or null"
        )
    return positions


def _check_layered_ropes(config: DecoderConfig, place: str) -> None:
    """Refuse ropes for kinds of layers in a family that has one rope, and a kind of layer without a rope."""
    ropes = {kind for kind, value in config.hf["rope_parameters"].items() if isinstance(value, Mapping)}
    if not ropes:
        return
    if not config.family.layered_ropes:
        raise CheckpointError(
            f"{place}: rope_parameters hold a rope for {min(ropes)!r}, and all layers of {config.family.model_type} "
            "models share one; the file is damaged"
        )
    without = sorted(set(config.hf["layer_types"]) - ropes)
    if without:
        raise CheckpointError(f"{place}: rope_parameters lack a rope for {without[0]!r}; the file is damaged")


def _mixture(experts: Experts | None, hf: Any, place: str) -> dict[str, Any]:
    """Return the fields that describe a mixture of experts.

    Raises:
        CheckpointError: Some layers have no experts, or the sizes contradict each other.
    """
    if experts is None:
        return {"num_experts": 0, "experts_per_token": 0, "expert_size": 0, "renormalized_routing": True}
    everywhere: Mapping[str, Any] = {"decoder_sparse_step": 1, "mlp_only_layers": []}
    for key, none in everywhere.items():
        value = getattr(hf, key, none)
        if value != none:
            raise CheckpointError(
                f"{place}: {key} {value} mixes dense feed-forward blocks with experts; supported: experts in "
                "every layer"
            )
    count, picked, size = hf.num_local_experts, hf.num_experts_per_tok, getattr(hf, experts.size)
    if not 1 <= picked <= count or size < 1:
        raise CheckpointError(
            f"{place}: {picked} of {count} experts with {experts.size} {size}: expected at least one for a token, no "
            "more than there are, and a channel in each; the file is damaged"
        )
    renormalized = experts.renormalizes is None or bool(getattr(hf, experts.renormalizes))
    return {
        "num_experts": count,
        "experts_per_token": picked,
        "expert_size": size,
        "renormalized_routing": renormalized,
    }


def _check_activation(family: Family, raw: Mapping[str, Any], place: str) -> None:
    key = "hidden_activation" if raw.get("hidden_activation") else "hidden_act"
    known = {"silu": ("silu", "swish"), "gelu_pytorch_tanh": ("gelu_pytorch_tanh",)}[family.activation]
    # Gemma's first configurations say "gelu" and mean the tanh form, as transformers reads them.
    accepted = (*known, "gelu") if family.model_type == "gemma" else known
    activation = raw.get(key) or family.activation
    if activation not in accepted:
        raise CheckpointError(
            f"{place}: {key} is {activation!r}; supported for {family.model_type}: {family.activation}"
        )


def _check_rope(config: DecoderConfig, kind: str | None, place: str) -> None:
    """Refuse a rope kind that is not known, and parameters that make no frequencies."""
    rope = config.rope(kind)
    if rope.kind not in ROPE_TYPES:
        supported = ", ".join(ROPE_TYPES)
        raise CheckpointError(f"{place}: rope type {rope.kind!r} is not supported (supported: {supported})")
    try:
        positive(rope.parameters, "rope_theta")
        # Within the original length and beyond it, where kinds that look at the length read other parameters.
        for length in (1, max(rope.positions, rope.original_positions) + 1):
            frequencies(rope, length)
    except Exception as error:  # whatever numbers of the wrong kind or count make torch raise
        raise CheckpointError(
            f"{place}: rope_parameters of type {rope.kind!r} are damaged: {one_line(error)}"
        ) from error
    if rope.channels != config.head_dim and not config.family.partial_rotation:
        raise CheckpointError(
            f"{place}: partial_rotary_factor {rope.parameters['partial_rotary_factor']} rotates {rope.channels} of "
            f"{config.head_dim} channels, which {config.family.model_type} models cannot do"
        )


def _biased(family: Family, hf: Any) -> frozenset[str]:
    attention = [f"self_attn.{name}_proj" for name in "qkvo"] if getattr(hf, "attention_bias", False) else []
    mlp = [f"mlp.{name}_proj" for name in ("gate", "up", "down")] if getattr(hf, "mlp_bias", False) else []
    return frozenset((*family.biased, *attention, *mlp))


def _check_sizes(raw: Mapping[str, Any], place: str) -> None:
    """Refuse sizes that are none, or that contradict each other."""
    for key in (*_SIZES, *_EXPERT_COUNTS):
        value, largest = raw.get(key), _LARGEST.get(key, _LARGEST_SIZE)
        least = 0 if key in _EXPERT_COUNTS else 1  # how many experts a token needs is checked with its other sizes
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise CheckpointError(f"{place}: {key} is {value!r}; expected a whole number above 0: the file is damaged")
        if value is not None and value > largest:
            raise CheckpointError(f"{place}: {key} is {value}; expected at most {largest:,}: the file is damaged")
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


def linear_shapes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """Return the linears of one decoder layer with their [out_features, in_features]; the layout of its family."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, key_value = (count * config.head_dim for count in (config.num_attention_heads, config.num_key_value_heads))
    shapes: dict[str, tuple[int, int]] = {}
    if config.family.fused_projections:
        shapes["self_attn.qkv_proj"] = (heads + 2 * key_value, hidden)
    else:
        rows = {"q": heads, "k": key_value, "v": key_value}
        shapes |= {f"self_attn.{name}_proj": (count, hidden) for name, count in rows.items()}
    shapes["self_attn.o_proj"] = (hidden, heads)
    experts, inner_of_expert = config.family.experts, config.expert_size
    if experts:
        shapes[f"{experts.block}.gate"] = (config.num_experts, hidden)
        for expert in range(config.num_experts):
            stem = f"{experts.block}.experts.{expert}"
            shapes |= {f"{stem}.{name}": (inner_of_expert, hidden) for name in (experts.gate, experts.up)}
            shapes[f"{stem}.{experts.down}"] = (hidden, inner_of_expert)
        return shapes
    if config.family.fused_projections:
        shapes["mlp.gate_up_proj"] = (2 * inner, hidden)
    else:
        shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden)}
    shapes["mlp.down_proj"] = (hidden, inner)
    return shapes


def layer_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Return every tensor of one decoder layer, by its name inside the layer, with its shape."""
    family, hidden = config.family, (config.hidden_size,)
    norms = [norm for norm in (family.attention_norm, family.mlp_norm, *family.post_norms) if norm is not None]
    shapes: dict[str, tuple[int, ...]] = {f"{norm}.weight": hidden for norm in norms}
    if family.qk_norm is not None:
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
        normed = {name: 1 if family.qk_norm == "head" else count for name, count in heads.items()}
        shapes |= {f"self_attn.{name}_norm.weight": (count * config.head_dim,) for name, count in normed.items()}
    for linear, shape in linear_shapes(config).items():
        shapes[f"{linear}.weight"] = shape
        if linear in config.biased:
            shapes[f"{linear}.bias"] = (shape[0],)
    return shapes


def tensor_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Return every tensor the decoder needs, by HF name, with its shape.

    Linear weights are [out_features, in_features]. `lm_head.weight` is absent when tied to the embedding.
    """
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, config.hidden_size),
        "model.norm.weight": (config.hidden_size,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    layer = layer_shapes(config)
    for index in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes
