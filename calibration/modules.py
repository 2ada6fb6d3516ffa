"""The linear modules of a decoder layer, and which of them share one input tensor (method: module set M).

One *representative* stands for all linears that read the same tensor: `q_proj` for q, k, v and `up_proj` for
up, gate. A choice made for a representative holds for its *siblings* too.
Source: arXiv 2405.14428, and the sibling expansion of its reference code.
"""

from collections.abc import Mapping

SIBLINGS: Mapping[str, tuple[str, ...]] = {
    "self_attn.q_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.up_proj": ("mlp.up_proj", "mlp.gate_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
"""Representative → the linears that read its input, inside one decoder layer, in execution order."""


def representatives(num_layers: int) -> tuple[str, ...]:
    """Return the HF names of all representative modules, layer by layer in execution order."""
    return tuple(f"model.layers.{index}.{name}" for index in range(num_layers) for name in SIBLINGS)


def siblings(representative: str) -> tuple[str, ...]:
    """Return the HF names of the linears that read the same input as `representative`, itself included.

    Raises:
        KeyError: The name is not a representative's.
    """
    layer, name = split_name(representative)
    return tuple(f"model.layers.{layer}.{sibling}" for sibling in SIBLINGS[name])


def linears(num_layers: int) -> tuple[str, ...]:
    """Return the HF names of all decoder linears."""
    return tuple(linear for name in representatives(num_layers) for linear in siblings(name))


def split_name(module: str) -> tuple[int, str]:
    """Split `model.layers.11.mlp.down_proj` into (11, "mlp.down_proj").

    Raises:
        ValueError: The name is not that of a decoder layer's module.
    """
    parts = module.split(".", 3)
    if len(parts) != 4 or parts[:2] != ["model", "layers"] or not parts[2].isdigit():
        raise ValueError(f"{module!r} is not the name of a decoder layer's module")
    return int(parts[2]), parts[3]
