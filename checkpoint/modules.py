"""The linear modules of a decoder layer, and which of them share one input tensor (method: module set M).

One *representative* stands for all linears that read the same tensor: `q_proj` for q, k, v and `up_proj` for
up, gate. A choice made for a representative holds for its *siblings* too.
Source: arXiv 2405.14428, and the sibling expansion of its reference code (where an expert's `w1` is forgotten: its
input is `w3`'s, so both belong together here).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from spike_export.checkpoint.decoder_config import DecoderConfig
from spike_export.checkpoint.families import FAMILIES, Experts

_MIXTURES: Mapping[str, Experts] = {
    family.experts.block: family.experts for family in FAMILIES.values() if family.experts
}
"""Feed-forward block → the naming of its experts."""

_ROUTERS = tuple(f"{block}.gate" for block in _MIXTURES)
_EXPERT = re.compile(rf"(?P<stem>(?P<block>{'|'.join(_MIXTURES)})\.experts\.(?P<index>\d+))\.(?P<linear>\w+)")


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
} | {router: (router,) for router in _ROUTERS}
"""Representative → the linears that read its input, inside one decoder layer; an expert's are made by `siblings`."""


def _expert_sites(experts: Experts, count: int) -> tuple[InputSite, ...]:
    router = f"{experts.block}.gate"
    sites = [InputSite(router, (router,), _MLP_NORM)]
    for index in range(count):
        stem = f"{experts.block}.experts.{index}"
        gate, up, down = (f"{stem}.{name}" for name in (experts.gate, experts.up, experts.down))
        sites.append(InputSite(up, (up, gate), _MLP_NORM))
        sites.append(InputSite(down, (down,), up))
    return tuple(sites)


def input_sites(config: DecoderConfig) -> tuple[InputSite, ...]:
    """Return the input tensors of one decoder layer, in execution order."""
    family = config.family
    attention = _FUSED_ATTENTION if family.fused_projections else _ATTENTION
    mlp = _FUSED_MLP if family.fused_projections else _MLP
    sites = attention + (_expert_sites(family.experts, config.num_experts) if family.experts else mlp)
    norms = {_ATTENTION_NORM: family.attention_norm, _MLP_NORM: family.mlp_norm}
    return tuple(
        InputSite(site.representative, site.readers, norms.get(site.producer or "", site.producer)) for site in sites
    )


def block_inputs(config: DecoderConfig) -> tuple[str, str | None]:
    """Return the representatives of what attention and the feed-forward block of a layer read, named inside the layer.

    None where several inputs share the tensor: a router and the experts of a mixture.
    """
    family = config.family
    blocks = (_FUSED_ATTENTION, _FUSED_MLP) if family.fused_projections else (_ATTENTION, _MLP)
    attention, feed_forward = (sites[0].representative for sites in blocks)
    return attention, None if family.experts else feed_forward


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
        names = _MIXTURES[expert["block"]]
        read = {names.up: (names.up, names.gate), names.down: (names.down,)}[expert["linear"]]
        readers = tuple(f"{expert['stem']}.{linear}" for linear in read)
    return tuple(f"model.layers.{layer}.{reader}" for reader in readers)


def representative_of(module: str) -> str:
    """Return the HF name of the linear that stands for `module`: itself, or the sibling that does.

    Raises:
        ValueError: The name is not that of a decoder layer's module.
    """
    layer, name = split_name(module)
    expert = _EXPERT.fullmatch(name)
    if expert is None:
        owner = next((key for key, readers in SIBLINGS.items() if name in readers), name)
    else:
        names = _MIXTURES[expert["block"]]
        owner = f"{expert['stem']}.{names.up if expert['linear'] == names.gate else expert['linear']}"
    return f"model.layers.{layer}.{owner}"


def linears(config: DecoderConfig) -> tuple[str, ...]:
    """Return the HF names of all decoder linears, the routers of a mixture of experts included."""
    return tuple(linear for name in representatives(config) for linear in siblings(name))


def is_router(module: str) -> bool:
    """Return whether the module is a mixture of experts' router, which is never quantized."""
    return module.endswith(_ROUTERS)


def is_down_projection(module: str) -> bool:
    """Return whether the module ends a feed-forward block, or an expert of one; named inside the layer or in full."""
    expert = _EXPERT.search(module)
    if expert:
        return expert["linear"] == _MIXTURES[expert["block"]].down
    return module.endswith("mlp.down_proj")


def is_output_projection(module: str) -> bool:
    """Return whether the module ends attention; named inside the layer or in full."""
    return module.endswith("self_attn.o_proj")


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
    return int(expert["index"]) if expert else None
