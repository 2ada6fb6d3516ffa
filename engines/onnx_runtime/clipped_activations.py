"""Counts activations beyond the range of their static scale, in a share of the calls, by groups of modules.

Where the text of users differs from what a model was calibrated on, activations outgrow their scales and are clipped.
A graph that generates gets nodes that count this where a call asks for it. They stand in the branch of an `If`, so that
they cost nothing in other calls.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from spike_export.artifacts.errors import EngineError

COUNT_CLIPPED = "count_clipped"
"""Input [1] bool: whether this call counts."""

CLIPPED = "clipped"
"""Output [sites, 2] int64: values beyond the range, and all values; zeros where the call does not count."""

GROUPS: Mapping[str, str] = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj"), "attention_input"),
    "o_proj": "o_proj",
    **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj", "w1", "w3"), "gate_up"),
    **dict.fromkeys(("down_proj", "w2"), "down_proj"),
}
"""Last part of a linear's name → the group that its input belongs to."""

_SITES_TOGETHER = 32
"""Sites that one `If` counts. An `If` costs about as much as a small operator in calls that do not count; what it reads
stays in memory until it runs, and a few layers' activations are little."""

_LOWEST, _HIGHEST = -128.5, 127.5
"""Quotients of value and scale that are rounded into INT8 lie between these."""


@dataclass(frozen=True, slots=True)
class Site:
    """A tensor that is quantized by a constant scale.

    Attributes:
        module: HF name of the first linear that reads it.
        tensor: Its name; float16 or float32.
        scale: Of the quantization.
        group: Of the modules that read it.
        node: Place in the graph of the first node that quantizes it.
    """

    module: str
    tensor: str
    scale: float
    group: str
    node: int


@dataclass
class ClippedActivations:
    """Counts of the calls that were asked to count.

    Attributes:
        groups: Group of each site of the graph.
        share: Of the calls that count, 0 to 1.
        counts: Group → (values beyond the range, all values) so far.
    """

    groups: Sequence[str]
    share: float
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)
    _draw: random.Random = field(default_factory=lambda: random.Random(0))

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise EngineError(f"clipped activations are counted in {self.share} of the calls; expected 0 to 1")
        self.counts = dict.fromkeys(self.groups, (0, 0))

    def due(self) -> bool:
        """Draw whether the next call counts: calls recur in patterns that a fixed interval could fall in with."""
        return self._draw.random() < self.share

    def add(self, found: NDArray[np.int64]) -> None:
        """Take what a call that counted gave, [sites, 2]."""
        for group, (beyond, values) in zip(self.groups, found.tolist(), strict=True):
            before = self.counts[group]
            self.counts[group] = (before[0] + beyond, before[1] + values)


def count_clipped(graph: onnx.GraphProto, bundle: Path) -> tuple[Site, ...]:
    """Let calls count what they clip; return the sites.

    Args:
        graph: Changed in place.
        bundle: Folder that has the graph's weights.

    Raises:
        EngineError: No activation has a constant scale of INT8.
    """
    sites = list(quantized_sites(graph, bundle))
    if not sites:
        raise EngineError(f"{bundle}: no activation has a static INT8 scale, so that none is clipped")
    graph.input.append(helper.make_tensor_value_info(COUNT_CLIPPED, TensorProto.BOOL, [1]))
    graph.output.append(helper.make_tensor_value_info(CLIPPED, TensorProto.INT64, [len(sites), 2]))
    counters = []
    for start in reversed(range(0, len(sites), _SITES_TOGETHER)):  # from the back: places in front stay
        together = sites[start : start + _SITES_TOGETHER]
        counters.append(_counter(f"{CLIPPED}.{start}", together))
        graph.node.insert(together[-1].node + 1, counters[-1])
    counts = [node.output[0] for node in reversed(counters)]
    graph.node.append(helper.make_node("Concat", counts, [CLIPPED], name=f"{CLIPPED}.Concat", axis=0))
    return tuple(sites)


def quantized_sites(graph: onnx.GraphProto, bundle: Path) -> Iterator[Site]:
    """Yield each tensor that is quantized by a constant once, whichever linears read it, in the graph's order.

    A scale per token is none, although the quantizer behind the division by it has a constant one.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    names = {node.name for node in graph.node}
    found: set[tuple[str, float]] = set()
    for place, node in enumerate(graph.node):
        if node.op_type != "QuantizeLinear" or node.input[1] not in constants:
            continue
        module = node.name.removesuffix(".QuantizeLinear")
        group = None if f"{module}.token_rescale" in names else GROUPS.get(module.rsplit(".", 1)[-1])
        zero = constants.get(node.input[2]) if len(node.input) > 2 else None
        if group is None or zero is None or zero.data_type != TensorProto.INT8:
            continue
        scale = float(numpy_helper.to_array(constants[node.input[1]], str(bundle)))
        if (node.input[0], scale) not in found:
            found.add((node.input[0], scale))
            yield Site(module, node.input[0], scale, group, place)


def _counter(name: str, sites: Sequence[Site]) -> onnx.NodeProto:
    """Return the node that counts several sites, or gives zeros."""
    counts: list[str] = []
    nodes: list[onnx.NodeProto] = []
    constants = [_constant(f"{name}.place", np.array([0]))]
    for number, site in enumerate(sites):
        site_nodes, site_constants = _site_counter(f"{name}.{number}", site, f"{name}.place")
        nodes += site_nodes
        constants += site_constants
        counts.append(site_nodes[-1].output[0])
    nodes.append(helper.make_node("Concat", counts, [f"{name}.counted"], axis=0))
    zeros = _constant(f"{name}.zeros", np.zeros((len(sites), 2), np.int64))
    nothing = helper.make_node("Identity", [zeros.name], [f"{name}.not_counted"])
    return helper.make_node(
        "If",
        [COUNT_CLIPPED],
        [f"{name}.counts"],
        name=f"{name}.If",
        then_branch=_branch(nodes, len(sites), constants),
        else_branch=_branch([nothing], len(sites), [zeros]),
    )


def _site_counter(name: str, site: Site, place: str) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Return nodes whose last output is [1, 2] int64 for one site, and their constants."""
    low, high = (
        _constant(f"{name}.{edge}", np.float32(bound * site.scale))
        for edge, bound in (("low", _LOWEST), ("high", _HIGHEST))
    )

    def node(kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(kind, inputs, [f"{name}.{output}"], **attributes)

    return [
        node("Cast", [site.tensor], "values", to=TensorProto.FLOAT),
        node("Less", [f"{name}.values", low.name], "below"),
        node("Greater", [f"{name}.values", high.name], "above"),
        node("Or", [f"{name}.below", f"{name}.above"], "beyond"),
        node("Cast", [f"{name}.beyond"], "ones", to=TensorProto.INT64),
        node("ReduceSum", [f"{name}.ones"], "sum", keepdims=0),
        node("Size", [site.tensor], "size"),
        node("Unsqueeze", [f"{name}.sum", place], "sums"),
        node("Unsqueeze", [f"{name}.size", place], "sizes"),
        node("Concat", [f"{name}.sums", f"{name}.sizes"], "pair", axis=0),
        node("Unsqueeze", [f"{name}.pair", place], "pairs"),
    ], [low, high]


def _branch(nodes: Sequence[onnx.NodeProto], sites: int, constants: Sequence[onnx.TensorProto]) -> onnx.GraphProto:
    result = nodes[-1].output[0]
    output = helper.make_tensor_value_info(result, TensorProto.INT64, [sites, 2])
    return helper.make_graph(nodes, result, [], [output], constants)


def _constant(name: str, value: Any) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(value), name)
