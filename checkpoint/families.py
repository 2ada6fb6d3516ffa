"""The model families: what each differs in from plain LLaMA, one table row a family.

A row says how a decoder layer is built; sizes come from the checkpoint's own configuration.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from spike_export.checkpoint.factors import (
    Factors,
    gemma2_factors,
    gemma3_factors,
    gemma_factors,
    granite_factors,
    no_factors,
)

Activation = Literal["silu", "gelu_pytorch_tanh"]
"""The gate's function, as HF names it."""


@dataclass(frozen=True, slots=True)
class Experts:
    """How a family's checkpoints name a mixture of experts, and where its configuration holds the sizes.

    Attributes:
        block: The feed-forward block inside a layer; its router is `<block>.gate`, an expert `<block>.experts.N`.
        gate: The expert's linear whose output passes the activation.
        up: The one whose output is multiplied by it.
        down: The one that reads their product.
        size: Key of an expert's inner channels.
        renormalizes: Key of a switch that makes the picked experts' shares add up to one; None where they always do.
    """

    block: str
    gate: str
    up: str
    down: str
    size: str
    renormalizes: str | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """The structure of a family's decoder layer.

    Attributes:
        model_type: HF's `model_type`.
        architecture: HF's class, which `config.json` names under `architectures`.
        sliding_window: Whether attention obeys `config.sliding_window` (in the layers that `layer_types` names, where
            there is such a list).
        activation: The gate's function.
        norm_offset: What an RMSNorm adds to its stored weight before it multiplies: 1 for Gemma's (1 + w).
        float32_gain: Whether an RMSNorm rounds to the decoder's dtype after it has multiplied by its weight, instead
            of before.
        float32_rotation: Whether rope's cosines and sines stay float32 where the decoder's dtype is another.
        layered_ropes: Whether each kind of layer has a rope of its own.
        partial_rotation: Whether `partial_rotary_factor` tells how many of a head's channels are rotated.
        attention_norm: The norm in front of attention; None where attention reads the residual stream itself.
        mlp_norm: The norm in front of the feed-forward block; None likewise.
        post_norms: Norms behind attention and behind the feed-forward block, inside the residual branch (sandwich
            norms); empty for most families.
        qk_norm: Whether queries and keys are normalized, each head by itself or the whole projection.
        fused_projections: Whether q, k, v are one linear, and gate and up another.
        biased: Linears that always have a bias. LLaMA's `attention_bias` and `mlp_bias` add to them.
        experts: The feed-forward block's mixture of experts, or None.
        factors: Reads what the family scales by from HF's configuration.
    """

    model_type: str
    architecture: str
    sliding_window: bool = False
    activation: Activation = "silu"
    norm_offset: float = 0.0
    float32_gain: bool = False
    float32_rotation: bool = False
    layered_ropes: bool = False
    partial_rotation: bool = False
    attention_norm: str | None = "input_layernorm"
    mlp_norm: str | None = "post_attention_layernorm"
    post_norms: tuple[str, ...] = ()
    qk_norm: Literal["head", "projection"] | None = None
    fused_projections: bool = False
    biased: tuple[str, ...] = ()
    experts: Experts | None = None
    factors: Callable[[Mapping[str, Any]], Factors] = no_factors

    @property
    def feed_forward(self) -> str:
        """Name of the feed-forward block inside a layer."""
        return self.experts.block if self.experts else "mlp"


_POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

_ROWS = (
    # LLaMA-2/3, SOLAR and SmolLM2 all call themselves "llama" in their config.json.
    Family("llama", "LlamaForCausalLM"),
    Family("mistral", "MistralForCausalLM", sliding_window=True),
    Family(
        "mixtral",
        "MixtralForCausalLM",
        sliding_window=True,
        experts=Experts("block_sparse_moe", gate="w1", up="w3", down="w2", size="intermediate_size"),
    ),
    Family(
        "gemma",
        "GemmaForCausalLM",
        activation="gelu_pytorch_tanh",
        norm_offset=1.0,
        float32_gain=True,
        factors=gemma_factors,
    ),
    Family(
        "gemma2",
        "Gemma2ForCausalLM",
        sliding_window=True,
        activation="gelu_pytorch_tanh",
        norm_offset=1.0,
        float32_gain=True,
        mlp_norm="pre_feedforward_layernorm",
        post_norms=_POST_NORMS,
        factors=gemma2_factors,
    ),
    Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        sliding_window=True,
        layered_ropes=True,
        activation="gelu_pytorch_tanh",
        norm_offset=1.0,
        float32_gain=True,
        mlp_norm="pre_feedforward_layernorm",
        post_norms=_POST_NORMS,
        qk_norm="head",
        factors=gemma3_factors,
    ),
    Family("granite", "GraniteForCausalLM", factors=granite_factors),
    Family(
        "olmo2",
        "Olmo2ForCausalLM",
        float32_gain=True,
        float32_rotation=True,
        attention_norm=None,
        mlp_norm=None,
        post_norms=_POST_NORMS,
        qk_norm="projection",
    ),
    Family("phi3", "Phi3ForCausalLM", sliding_window=True, partial_rotation=True, fused_projections=True),
    # Qwen2 and Qwen2.5.
    Family("qwen2", "Qwen2ForCausalLM", sliding_window=True, biased=_QKV),
    Family("qwen3", "Qwen3ForCausalLM", sliding_window=True, qk_norm="head"),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        sliding_window=True,
        qk_norm="head",
        experts=Experts(
            "mlp",
            gate="gate_proj",
            up="up_proj",
            down="down_proj",
            size="moe_intermediate_size",
            renormalizes="norm_topk_prob",
        ),
    ),
)

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in _ROWS}
"""HF's `model_type` → its row."""
