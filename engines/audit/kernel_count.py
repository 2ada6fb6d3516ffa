"""How many kernels a layer of the model compiles to, and which of them compute attention."""

import re
from collections import Counter
from collections.abc import Sequence

from spike_export.engines.audit.module_names import layer_of
from spike_export.engines.audit.reading import Kernel

_FUSED_ATTENTION = re.compile(r"(?:^|_)mha(?:_|$)|flash|fmha")
_PLACE = re.compile(r"_myl\d+_\d+$")
ATTENTION_SUFFIX = ".Attention"


def layer_kernels(kernels: Sequence[Kernel]) -> dict[int | None, list[Kernel]]:
    """Return every kernel under the layer it belongs to; under None those of no layer: embedding, masks, head.

    A kernel that names no node at all, such as a copy, belongs to the layer of the one before it.
    """
    layers: dict[int | None, list[Kernel]] = {}
    current: int | None = None
    for kernel in kernels:
        if kernel.nodes:
            current = layer_of(kernel.nodes)
        layers.setdefault(current, []).append(kernel)
    return layers


def attention_kernels(kernels: Sequence[Kernel]) -> Counter[str]:
    """Return the fused attention kernels by name, and how many layers use each."""
    return Counter(_PLACE.sub("", kernel.name) for kernel in kernels if _attends(kernel))


def unfused_attention(kernels: Sequence[Kernel]) -> tuple[str, ...]:
    """Return the Attention nodes that no fused kernel computes."""
    nodes = dict.fromkeys(node for kernel in kernels for node in kernel.nodes if node.endswith(ATTENTION_SUFFIX))
    fused = {node for kernel in kernels if _attends(kernel) for node in kernel.nodes}
    return tuple(node for node in nodes if node not in fused)


def _attends(kernel: Kernel) -> bool:
    named = any(node.endswith(ATTENTION_SUFFIX) for node in kernel.nodes)
    return named and _FUSED_ATTENTION.search(kernel.name) is not None
