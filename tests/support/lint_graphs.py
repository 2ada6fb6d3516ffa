"""Small graphs for the linter's tests: the shipped pattern of a quantized product, and every way to get it wrong."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

FLOAT, HALF, INT64, BOOL = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64, TensorProto.BOOL

OPSET, IR_VERSION = 24, 11


def node(op: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **attributes: Any) -> onnx.NodeProto:
    """A node that is named after its first output."""
    return helper.make_node(op, inputs, outputs, name=f"{outputs[0]}.{op}", domain=domain, **attributes)


def stored(name: str, values: Any, dtype: Any = None) -> TensorProto:
    return numpy_helper.from_array(np.asarray(values, dtype), name)


def value(name: str, elem: int, shape: Sequence[int | str] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, elem, shape)


def graph(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    initializers: Sequence[TensorProto] = (),
    *,
    opset: int = OPSET,
    ir_version: int = IR_VERSION,
    domains: Sequence[str] = (),
) -> onnx.ModelProto:
    made = helper.make_graph(nodes, "lint", inputs, outputs, initializers)
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(made, opset_imports=imports, ir_version=ir_version)


def ints(*shape: int, seed: int = 0) -> NDArray[np.int8]:
    return np.random.default_rng(seed).integers(-127, 128, shape).astype(np.int8)


@dataclass(frozen=True)
class Linear:
    """x [rows, K] → Q → DQ → MatMul with a stored INT8 weight, every part of it to be replaced.

    Attributes:
        scale: Of the activation.
        weight_scale: None: 0.01 for each channel along `axis`.
        zero_point: Of the activation; None leaves it out.
        cast: Put a Cast of this type behind both dequantizers.
    """

    weight: NDArray[Any] = field(default_factory=lambda: ints(64, 64))
    scale: Any = 0.02
    scale_type: Any = np.float32
    weight_scale: Any = None
    axis: int = 1
    zero_point: Any = field(default_factory=lambda: np.int8(0))
    weight_zero_point: Any = None
    input_type: int = FLOAT
    op: str = "MatMul"
    attributes: dict[str, Any] = field(default_factory=dict)
    quantizer: dict[str, Any] = field(default_factory=dict)
    dequantizer: dict[str, Any] = field(default_factory=dict)
    weight_dequantizer: dict[str, Any] = field(default_factory=dict)
    cast: int | None = None
    quantize_input: bool = True
    quantize_weight: bool = True
    leading: tuple[int | str, ...] = ("rows",)

    @property
    def elem(self) -> int:
        return int(self.dequantizer.get("output_dtype") or {np.float32: FLOAT, np.float16: HALF}[self.scale_type])

    def model(self) -> onnx.ModelProto:
        nodes, tensors, left = [], [], "x"
        rows = self.weight.shape[-2] if not self.attributes.get("transB") else self.weight.shape[-1]
        if self.quantize_input:
            zero = [] if self.zero_point is None else ["zero_point"]
            tensors += [stored("scale", self.scale, self.scale_type)]
            tensors += [] if self.zero_point is None else [stored("zero_point", self.zero_point)]
            nodes.append(node("QuantizeLinear", ["x", "scale", *zero], ["q"], **self.quantizer))
            nodes.append(node("DequantizeLinear", ["q", "scale", *zero], ["d"], **self.dequantizer))
            left = "d"
        if self.quantize_weight:
            channels = np.full(self.weight.shape[self.axis], 0.01) if self.weight_scale is None else self.weight_scale
            tensors += [stored("weight", self.weight), stored("weight_scale", channels, self.scale_type)]
            inputs = ["weight", "weight_scale"]
            if self.weight_zero_point is not None:
                tensors.append(stored("weight_zero_point", self.weight_zero_point))
                inputs.append("weight_zero_point")
            axis = {"axis": self.axis} if np.ndim(channels) else {}
            nodes.append(node("DequantizeLinear", inputs, ["w"], **axis, **self.weight_dequantizer))
        else:
            tensors.append(stored("w", self.weight.astype(self.scale_type)))
        right, elem = "w", self.elem
        if self.cast is not None:
            nodes += [node("Cast", [left], ["dc"], to=self.cast), node("Cast", ["w"], ["wc"], to=self.cast)]
            left, right, elem = "dc", "wc", self.cast
        nodes.append(node(self.op, [left, right], ["y"], **self.attributes))
        return graph(nodes, [value("x", self.input_type, [*self.leading, rows])], [value("y", elem, None)], tensors)

    def but(self, **changes: Any) -> "Linear":
        return replace(self, **changes)


def siblings(
    scales: Sequence[float] = (0.02, 0.02, 0.02),
    zero_points: Sequence[str] = ("za", "zb", "zc"),
    *,
    shared: bool = False,
    per_token: str = "",
    size: int = 64,
) -> onnx.ModelProto:
    """Three products of one tensor, as q, k and v are; by default each with a quantizer of its own.

    Those named in `per_token` read tokens that were divided by their own largest magnitude.
    """
    nodes, tensors = [], [stored(name, np.int8(0)) for name in dict.fromkeys(zero_points)]
    if per_token:
        tensors.append(stored("last", [-1], np.int64))
        nodes = [node("Abs", ["x"], ["magnitude"]), node("ReduceMax", ["magnitude", "last"], ["step"])]
        nodes.append(node("Div", ["x", "step"], ["divided"]))
    for place, (name, scale, zero) in enumerate(zip("abc", scales, zero_points, strict=True)):
        tensors += [stored(f"scale_{name}", scale, np.float32), stored(f"weight_{name}", ints(size, size, seed=place))]
        tensors.append(stored(f"weight_scale_{name}", np.full(size, 0.01), np.float32))
        source = "divided" if name in per_token else "x"
        restored = "d_a" if shared else f"d_{name}"
        if not shared or name == "a":
            nodes.append(node("QuantizeLinear", [source, f"scale_{name}", zero], [f"q_{name}"]))
            nodes.append(node("DequantizeLinear", [f"q_{name}", f"scale_{name}", zero], [f"d_{name}"]))
        weight = [f"weight_{name}", f"weight_scale_{name}"]
        nodes.append(node("DequantizeLinear", weight, [f"w_{name}"], axis=1))
        nodes.append(node("MatMul", [restored, f"w_{name}"], [f"y_{name}"]))
    # No Add: ONNX Runtime would take the product before it for a Gemm.
    nodes += [node("Mul", ["y_a", "y_b"], ["first"]), node("Mul", ["first", "y_c"], ["y"])]
    return graph(nodes, [value("x", FLOAT, ["rows", size])], [value("y", FLOAT, None)], tensors)


def attention(
    queries: Sequence[int | str] = (1, 4, "s", 64),
    keys: Sequence[int | str] = (1, 4, "k", 64),
    values: Sequence[int | str] | None = None,
    *,
    elem: int = HALF,
    mask: bool = True,
    inputs: Sequence[str] = (),
    declared: Sequence[onnx.ValueInfoProto] = (),
    outputs: int = 1,
    **attributes: Any,
) -> onnx.ModelProto:
    """One Attention over graph inputs; `inputs` come behind the mask."""
    made = [f"y{index}" for index in range(outputs)]
    operands = [value("q", elem, queries), value("k", elem, keys), value("v", elem, values or keys)]
    masks = [value("mask", BOOL, [1, 1, "s", "k"])] if mask else []
    names = ["q", "k", "v", "mask" if mask else "", *inputs]
    while not names[-1]:
        names.pop()
    return graph(
        [node("Attention", names, made, **attributes)],
        [*operands, *masks, *declared],
        [value(name, elem, None) for name in made],
    )


def scatter(
    *,
    cache: Sequence[int | str] = ("b", 2, 32, 16),
    update: Sequence[int | str] = ("b", 2, "s", 16),
    elem: int = HALF,
    indices: int = INT64,
    is_input: bool = True,
    is_output: bool = True,
    twice: bool = False,
    copied: bool = False,
    **attributes: Any,
) -> onnx.ModelProto:
    """One TensorScatter from the graph input `cache` to the graph output `present`."""
    nodes, place, outputs = [], "cache", []
    if not is_input:
        nodes.append(node("Add", ["cache", "cache"], ["doubled"]))
        place = "doubled"
    nodes.append(node("TensorScatter", [place, "update", "index"], ["present"], **attributes))
    outputs += [value("present", elem, None)] if is_output else []
    if twice:
        nodes.append(node("TensorScatter", [place, "update", "index"], ["second"], **attributes))
        outputs.append(value("second", elem, None))
    if copied or not is_output:
        nodes.append(node("Concat", ["present", "present"], ["y"], axis=-2))
        outputs.append(value("y", elem, None))
    inputs = [value("cache", elem, cache), value("update", elem, update), value("index", indices, ["b"])]
    return graph(nodes, inputs, outputs)


def save(model: onnx.ModelProto, folder: Path, name: str = "model.onnx") -> Path:
    path = folder / name
    path.write_bytes(model.SerializeToString())
    return path
