"""The linear modules of a decoder layer, and which of them share one input tensor (method: module set M).

One *representative* stands for all linears that read the same tensor: `q_proj` for q, k, v and `up_proj` for
up, gate. A choice made for a representative holds for its *siblings* too.
Source: arXiv 2405.14428, and the sibling expansion of its reference code (where an expert's `w1` is forgotten: its
input is `w3`'s, so both belong together here).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from spike_export.calibration.decoder_config import DecoderConfig

MOE = "block_sparse_moe"
ROUTER = f"{MOE}.gate"
_EXPERT = re.compile(rf"{MOE}\.experts\.(\d+)\.(w\d)")


@dataclass(frozen=True, slots=True)
class InputSite:
    """One input tensor of a decoder layer.

    Attributes:
        representative: The linear that stands for all readers; names are relative to the layer.
        readers: The linears that read the tensor, in execution order.
        producer: What makes the tensor, so that a scale per channel can be moved there: the name of an RMSNorm; or
            of the linear whose output rows enter the tensor as a factor (`v_proj` for `o_proj`, `up_proj` for
            `down_proj`). None where the tensor is the residual stream, whose scales nothing could take up.
    """

    representative: str
    readers: tuple[str, ...]
    producer: str | None

    @property
    def behind_norm(self) -> bool:
        """Whether an RMSNorm makes the tensor."""
        return self.producer is not None and "." not in self.producer

    @property
    def behind_linear(self) -> bool:
        """Whether a linear has a part in making the tensor, whose readers then write the residual stream."""
        return self.producer is not None and "." in self.producer


_ATTENTION_NORM = "(norm in front of attention)"
_MLP_NORM = "(norm in front of the feed-forward block)"
_ATTENTION = (
    InputSite("self_attn.q_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), _ATTENTION_NORM),
    InputSite("self_attn.o_proj", ("self_attn.o_proj",), "self_attn.v_proj"),
)
_FUSED_ATTENTION = (
    InputSite("self_attn.qkv_proj", ("self_attn.qkv_proj",), _ATTENTION_NORM),
    InputSite("self_attn.o_proj", ("self_attn.o_proj",), "self_attn.qkv_proj"),
)
_MLP = (
    InputSite("mlp.up_proj", ("mlp.up_proj", "mlp.gate_proj"), _MLP_NORM),
    InputSite("mlp.down_proj", ("mlp.down_proj",), "mlp.up_proj"),
)
_FUSED_MLP = (
    InputSite("mlp.gate_up_proj", ("mlp.gate_up_proj",), _MLP_NORM),
    InputSite("mlp.down_proj", ("mlp.down_proj",), "mlp.gate_up_proj"),
)

SIBLINGS: Mapping[str, tuple[str, ...]] = {
    site.representative: site.readers for site in (*_ATTENTION, *_FUSED_ATTENTION, *_MLP, *_FUSED_MLP)
} | {ROUTER: (ROUTER,)}
"""Representative → the linears that read its input, inside one decoder layer; an expert's are made by `siblings`."""


def _expert_sites(experts: int) -> tuple[InputSite, ...]:
    sites = [InputSite(ROUTER, (ROUTER,), _MLP_NORM)]
    for index in range(experts):
        gate, down, up = (f"{MOE}.experts.{index}.w{number}" for number in (1, 2, 3))
        sites.append(InputSite(up, (up, gate), _MLP_NORM))
        sites.append(InputSite(down, (down,), up))
    return tuple(sites)


def input_sites(config: DecoderConfig) -> tuple[InputSite, ...]:
    """Return the input tensors of one decoder layer, in execution order."""
    family = config.family
    attention = _FUSED_ATTENTION if family.fused_projections else _ATTENTION
    mlp = _FUSED_MLP if family.fused_projections else _MLP
    sites = attention + (_expert_sites(config.num_experts) if family.experts else mlp)
    norms = {_ATTENTION_NORM: family.attention_norm, _MLP_NORM: family.mlp_norm}
    return tuple(
        InputSite(site.representative, site.readers, norms.get(site.producer or "", site.producer)) for site in sites
    )


def representatives(config: DecoderConfig) -> tuple[str, ...]:
    """Return the HF names of all representative modules, layer by layer in execution order."""
    sites = input_sites(config)
    return tuple(
        f"model.layers.{index}.{site.representative}" for index in range(config.num_hidden_layers) for site in sites
    )


def siblings(representative: str) -> tuple[str, ...]:
    """Return the HF names of the linears that read the same input as `representative`, itself included.

    Raises:
        KeyError: The name is not a representative's.
    """
    layer, name = split_name(representative)
    expert = _EXPERT.fullmatch(name)
    if expert is None:
        readers = SIBLINGS[name]
    else:
        stem = name.removesuffix(expert[2])
        readers = tuple(stem + linear for linear in {"w3": ("w3", "w1"), "w2": ("w2",)}[expert[2]])
    return tuple(f"model.layers.{layer}.{reader}" for reader in readers)


def linears(config: DecoderConfig) -> tuple[str, ...]:
    """Return the HF names of all decoder linears, the routers of a mixture of experts included."""
    return tuple(linear for name in representatives(config) for linear in siblings(name))


def is_router(module: str) -> bool:
    """Return whether the module is a mixture of experts' router, which is never quantized."""
    return module.endswith(ROUTER)


def split_name(module: str) -> tuple[int, str]:
    """Split `model.layers.11.mlp.down_proj` into (11, "mlp.down_proj").

    Raises:
        ValueError: The name is not that of a decoder layer's module.
    """
    parts = module.split(".", 3)
    if len(parts) != 4 or parts[:2] != ["model", "layers"] or not parts[2].isdigit():
        raise ValueError(f"{module!r} is not the name of a decoder layer's module")
    return int(parts[2]), parts[3]


def expert_of(module: str) -> int | None:
    """Return the index of the expert a module belongs to, or None."""
    expert = _EXPERT.search(module)
    return int(expert[1]) if expert else None
