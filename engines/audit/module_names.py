"""From the ONNX nodes that a compiler names to the modules and layers of the model."""

import re
from collections.abc import Iterable

PRODUCT_SUFFIX = ".MatMul"
"""A module's product is the node of its name with this behind it."""

_ADDED = re.compile(r"(_U\d+)?( \[profile \d+\])?(_myl\d+_\d+)?$")
"""What the compilers put behind a node's name: a number against duplicates, the profile, a kernel's place."""

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def modules_of(nodes: Iterable[str]) -> tuple[str, ...]:
    """Return the modules whose products are among these nodes, each once; what compilers add to names is removed."""
    names = (_ADDED.sub("", node) for node in nodes)
    return tuple(dict.fromkeys(name.removesuffix(PRODUCT_SUFFIX) for name in names if name.endswith(PRODUCT_SUFFIX)))


def layer_of(nodes: Iterable[str]) -> int | None:
    """Return the first of the layers that nodes belong to; None where they belong to none.

    A kernel over the end of one layer and the beginning of the next counts for the former: every layer has one.
    """
    layers = (int(match.group(1)) for node in nodes if (match := _LAYER.search(node)))
    return min(layers, default=None)
