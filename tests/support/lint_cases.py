"""Planted faults for the linter: for every rule a graph with the fault, and the same graph without it."""

from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.support.lint_graphs import (
    FLOAT,
    HALF,
    INT64,
    Linear,
    attention,
    graph,
    ints,
    node,
    scatter,
    siblings,
    stored,
    value,
)

SOUND = Linear()
WEIGHTS_ONLY = SOUND.but(quantize_input=False)


def unary(op: str, domain: str = "", elem: int = FLOAT, **attributes: object) -> onnx.ModelProto:
    domains = [domain] if domain else []
    return graph(
        [node(op, ["x"], ["y"], domain, **attributes)],
        [value("x", elem, ["b", 8])],
        [value("y", elem, None)],
        domains=domains,
    )


def quantized(source: str, scale: str = "s", zero: str = "z", stem: str = "q") -> list[onnx.NodeProto]:
    return [
        node("QuantizeLinear", [source, scale, zero], [stem]),
        node("DequantizeLinear", [stem, scale, zero], [f"{stem}_restored"]),
    ]


SCALAR_AND_ZERO = [stored("s", 0.1, np.float32), stored("z", 0, np.int8)]


def scale_at_run_time(constant: bool = False) -> onnx.ModelProto:
    """The scale of x is max|x| / 127; or, where it is `constant`, 1 / 127, which the engine folds."""
    nodes = [
        node("ReduceMax", ["x"], ["amax"], keepdims=0),
        node("Div", ["one" if constant else "amax", "limit"], ["s"]),
        *quantized("x"),
        node("DequantizeLinear", ["w", "ws"], ["dw"], axis=1),
        node("MatMul", ["q_restored", "dw"], ["y"]),
    ]
    tensors = [stored("limit", 127, np.float32), stored("one", 1, np.float32), SCALAR_AND_ZERO[1]]
    tensors += [stored("w", ints(64, 64)), stored("ws", np.full(64, 0.01), np.float32)]
    return graph(nodes, [value("x", FLOAT, ["b", 64])], [value("y", FLOAT, None)], tensors)


def zero_point_input(given: bool = True) -> onnx.ModelProto:
    inputs = [value("x", FLOAT, ["b", 8])] + ([value("z", TensorProto.INT8, [])] if given else [])
    tensors = SCALAR_AND_ZERO[:1] if given else SCALAR_AND_ZERO
    return graph(quantized("x"), inputs, [value("q_restored", FLOAT, None)], tensors)


def scalar(rank: int = 0) -> onnx.ModelProto:
    nodes = [node("ReduceSum", ["x"], ["sum"], keepdims=int(rank > 0)), *quantized("sum")]
    return graph(nodes, [value("x", FLOAT, ["b", 8])], [value("q_restored", FLOAT, None)], SCALAR_AND_ZERO)


def gathered(int8_first: bool = True) -> onnx.ModelProto:
    """An INT8 table that is gathered and then dequantized, or the other way round."""
    first = [node("Gather", ["w", "ids"], ["rows"]), node("DequantizeLinear", ["rows", "s"], ["y"])]
    second = [node("DequantizeLinear", ["w", "s"], ["table"]), node("Gather", ["table", "ids"], ["y"])]
    tensors = [stored("w", ints(64, 64)), SCALAR_AND_ZERO[0]]
    inputs = [value("ids", INT64, ["b"])]
    return graph(first if int8_first else second, inputs, [value("y", FLOAT, None)], tensors)


def residual(quantize: bool = True) -> onnx.ModelProto:
    """The sum goes on through a quantizer, or the quantizer is in front of the product only."""
    nodes = [node("Add", ["x", "h"], ["sum"]), *quantized("sum"), node("MatMul", ["q_restored", "w"], ["p"])]
    nodes.append(node("Add", ["p", "q_restored" if quantize else "sum"], ["y"]))
    tensors = [*SCALAR_AND_ZERO, stored("w", np.eye(64), np.float32)]
    inputs = [value(name, FLOAT, ["b", 64]) for name in ("x", "h")]
    return graph(nodes, inputs, [value("y", FLOAT, None)], tensors)


def scores(both: bool = True) -> onnx.ModelProto:
    nodes = [*quantized("x", stem="qx"), *quantized("k", stem="qk")]
    nodes.append(node("MatMul", ["qx_restored", "qk_restored" if both else "k"], ["y"]))
    inputs = [value("x", FLOAT, [2, "b", 64]), value("k", FLOAT, [2, 64, "t"])]
    return graph(nodes, inputs, [value("y", FLOAT, None)], SCALAR_AND_ZERO)


def int32_bias(quantize: bool = True) -> onnx.ModelProto:
    model = SOUND.model()
    model.graph.node[-1].output[0] = "product"
    bias = [stored("bias", np.zeros(64), np.int32 if quantize else np.float32)]
    bias += [stored("bias_scale", np.full(64, 1e-4), np.float32)] if quantize else []
    model.graph.initializer.extend(bias)
    if quantize:
        model.graph.node.append(node("DequantizeLinear", ["bias", "bias_scale"], ["b"], axis=0))
    model.graph.node.append(node("Add", ["product", "b" if quantize else "bias"], ["y"]))
    return model


def trt_attention(lengths: bool = False) -> onnx.ModelProto:
    names = ["q", "k", "v", "", "", "lengths"] if lengths else ["q", "k", "v"]
    inputs = [value(name, HALF, [1, 4, name, 64]) for name in "qkv"]
    inputs += [value("lengths", TensorProto.INT32, [1])] if lengths else []
    attended = node("TRT_Attention", names, ["y"], "trt")
    return graph([attended], inputs, [value("y", HALF, None)], domains=["trt"])


def contrib(zero: int = 0) -> onnx.ModelProto:
    model = SOUND.but(zero_point=np.int8(zero)).model()
    model.opset_import.add(domain="com.microsoft", version=1)
    for made in model.graph.node:
        if made.op_type != "MatMul":
            made.domain = "com.microsoft"
    return model


def float8(zero: float = 0.0) -> Linear:
    """FP8 weights and activations, whose scales may well be float16."""
    weight = ints(64, 64).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    return SOUND.but(
        weight=weight,
        zero_point=np.asarray(zero, ml_dtypes.float8_e4m3fn),
        weight_zero_point=np.zeros(64, ml_dtypes.float8_e4m3fn),
        scale_type=np.float16,
        input_type=HALF,
    )


def branched(inside: bool) -> onnx.ModelProto:
    """The sound product as a branch of If, its constants inside or outside."""
    body = SOUND.model().graph
    tensors = list(body.initializer)
    then = helper.make_graph(list(body.node), "then", [], list(body.output), tensors if inside else [])
    other = helper.make_graph([node("Identity", ["x"], ["same"])], "else", [], [value("same", FLOAT, None)])
    chosen = node("If", ["flag"], ["result"], then_branch=then, else_branch=other)
    inputs = [value("flag", TensorProto.BOOL, []), *body.input]
    return graph([chosen], inputs, [value("result", FLOAT, None)], [] if inside else tensors)


def rotary(tables: type = np.float16, positions: int = INT64) -> onnx.ModelProto:
    tensors = [stored(name, np.ones((32, 8)), tables) for name in ("cos", "sin")]
    inputs = [value("x", HALF, ["b", 2, "s", 16]), value("p", positions, ["b", "s"])]
    rope = node("RotaryEmbedding", ["x", "cos", "sin", "p"], ["y"])
    return graph([rope], inputs, [value("y", HALF, None)], tensors)


def topk(count: int) -> onnx.ModelProto:
    nodes = [node("TopK", ["x", "count"], ["y", "index"])]
    outputs = [value("y", FLOAT, None), value("index", INT64, None)]
    return graph(nodes, [value("x", FLOAT, ["b", 8000])], outputs, [stored("count", [count], np.int64)])


def scattered(op: str, reduction: str) -> onnx.ModelProto:
    index = ["b", 8] if op == "ScatterElements" else ["b", 1]
    inputs = [value("x", FLOAT, ["b", 8]), value("i", INT64, index), value("u", FLOAT, ["b", 8])]
    return graph([node(op, ["x", "i", "u"], ["y"], reduction=reduction)], inputs, [value("y", FLOAT, None)])


def cache(
    heads: int | str = 2, present: str = "present.0.key", channels: int = 16, elem: int = HALF
) -> onnx.ModelProto:
    past = "past_key_values.0.key"
    inputs = [value(past, HALF, ["b", heads, "past", 16]), value("new", HALF, ["b", heads, "s", 16])]
    nodes = [node("Concat", [past, "new"], ["all"], axis=2), node("Cast", ["all"], [present], to=elem)]
    return graph(nodes, inputs, [value(present, elem, ["b", heads, "present", channels])])


def bfloat16(elem: int = TensorProto.BFLOAT16) -> onnx.ModelProto:
    dtype = ml_dtypes.bfloat16 if elem == TensorProto.BFLOAT16 else np.float16
    product = node("MatMul", ["x", "w"], ["y"])
    tensors = [stored("w", np.ones((32, 32)), dtype)]
    return graph([product], [value("x", elem, ["b", 32])], [value("y", elem, None)], tensors)


def named(*names: str) -> onnx.ModelProto:
    model = siblings()
    for product, name in zip((n for n in model.graph.node if n.op_type == "MatMul"), names, strict=True):
        product.name = name
    return model


def decomposed(set_: bool = True) -> onnx.ModelProto:
    return attention(TRT_decomposable=1) if set_ else attention()


def quantized_attention(quantize: bool = True) -> onnx.ModelProto:
    model = attention(elem=FLOAT)
    if quantize:
        model.graph.node[0].input[0] = "q8_restored"
        nodes = [*quantized("q", stem="q8"), *model.graph.node]
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        model.graph.initializer.extend(SCALAR_AND_ZERO)
    return model


def versioned(opset: int, ir_version: int = 11) -> onnx.ModelProto:
    model = unary("Relu")
    model.ir_version = ir_version
    model.opset_import[0].version = opset
    return model


def nan_weight_scale() -> Linear:
    scales = np.full(64, 0.01, np.float32)
    scales[7] = np.nan
    return SOUND.but(weight_scale=scales)


@dataclass(frozen=True)
class Case:
    """A rule, a graph with the fault, the node (or subject) that is meant, and the same graph without the fault."""

    rule: str
    planted: onnx.ModelProto
    place: str
    sound: onnx.ModelProto


NONPAD = {"inputs": ("", "", "n"), "declared": [value("n", INT64, [1])]}
PAST = {
    "inputs": ("pk", "pv"),
    "declared": [value(name, HALF, [1, 4, "p", 64]) for name in ("pk", "pv")],
}
Q, D, W, Y = "q.QuantizeLinear", "d.DequantizeLinear", "w.DequantizeLinear", "y.MatMul"
MIXED = SOUND.but(input_type=HALF)
A, S = "y0.Attention", "present.TensorScatter"

CASES: Mapping[str, Case] = {
    "zero scale": Case("scale-not-positive", SOUND.but(scale=0.0).model(), Q, SOUND.model()),
    "negative scale": Case("scale-not-positive", SOUND.but(scale=-0.1).model(), Q, SOUND.model()),
    "infinite scale": Case("scale-not-positive", SOUND.but(scale=np.inf).model(), Q, SOUND.model()),
    "nan in a channel": Case("scale-not-positive", nan_weight_scale().model(), W, SOUND.model()),
    "half scale underflows": Case(
        "scale-not-positive",
        SOUND.but(scale_type=np.float16, input_type=HALF, scale=1e-9).model(),
        Q,
        SOUND.but(scale_type=np.float16, input_type=HALF).model(),
    ),
    "scale at run time": Case("scale-at-run-time", scale_at_run_time(), Q, scale_at_run_time(constant=True)),
    "zero point 3": Case("zero-point-not-zero", SOUND.but(zero_point=np.int8(3)).model(), Q, SOUND.model()),
    "weight zero point": Case(
        "zero-point-not-zero",
        SOUND.but(weight_zero_point=np.full(64, 1, np.int8)).model(),
        W,
        SOUND.but(weight_zero_point=np.zeros(64, np.int8)).model(),
    ),
    "zero point input": Case("zero-point-at-run-time", zero_point_input(), Q, zero_point_input(given=False)),
    "uint8": Case("quantized-type", SOUND.but(zero_point=np.uint8(0)).model(), Q, SOUND.model()),
    "int16": Case("quantized-type", SOUND.but(zero_point=np.int16(0)).model(), Q, SOUND.model()),
    "uint8 by default": Case("quantized-type", SOUND.but(zero_point=None).model(), Q, SOUND.model()),
    "uint8 weight": Case("quantized-type", SOUND.but(weight=ints(64, 64).view(np.uint8)).model(), W, SOUND.model()),
    "int32 bias": Case("int32-bias", int32_bias(), "b.DequantizeLinear", int32_bias(quantize=False)),
    "activation channels": Case(
        "activation-scale-per-channel",
        SOUND.but(scale=np.full(64, 0.02), zero_point=np.zeros(64, np.int8)).model(),
        Q,
        SOUND.but(scale=[0.02], zero_point=np.zeros(1, np.int8)).model(),  # one scale, spelled as a list
    ),
    "int8 blocks": Case(
        "int8-blocks",
        SOUND.but(weight_scale=np.full((2, 64), 0.01), axis=0, weight_dequantizer={"block_size": 32}).model(),
        W,
        SOUND.model(),
    ),
    "half into float scale": Case("input-and-scale-types", MIXED.model(), Q, MIXED.but(scale_type=np.float16).model()),
    "restored in half": Case(
        "restored-type",
        SOUND.but(dequantizer={"output_dtype": HALF}, weight_dequantizer={"output_dtype": HALF}).model(),
        D,
        SOUND.but(dequantizer={"output_dtype": FLOAT}).model(),
    ),
    "scalar": Case("scalar-quantized", scalar(), Q, scalar(rank=1)),
    "gathered int8": Case("quantized-constant-reader", gathered(), "rows.Gather", gathered(int8_first=False)),
    "no zero point": Case(
        "zero-point-missing",
        SOUND.but(zero_point=None, quantizer={"output_dtype": TensorProto.INT8}).model(),
        Q,
        SOUND.model(),
    ),
    "shared": Case("shared-quantizer", siblings(shared=True), "q_a.QuantizeLinear", siblings()),
    "one zero point": Case("merged-quantizers", siblings(zero_points=("z",) * 3), "q_a.QuantizeLinear", siblings()),
    "last bit": Case(
        "sibling-scales",
        siblings((0.02, float(np.nextafter(np.float32(0.02), np.float32(1))), 0.02)),
        "q_a.QuantizeLinear",
        siblings(),
    ),
    "scales apart": Case(
        "sibling-scales-apart", siblings((0.02, 0.03, 0.02)), "q_a.QuantizeLinear", siblings((0.02, 0.0201, 0.02))
    ),
    "kinds apart": Case("sibling-kinds", siblings(per_token="c"), "q_c.QuantizeLinear", siblings(per_token="abc")),
    "scales of other channels": Case(
        "scale-count",
        SOUND.but(weight=ints(64, 48), weight_scale=np.full(64, 0.01)).model(),
        W,
        SOUND.but(weight=ints(64, 48)).model(),
    ),
    "axis that is not there": Case(
        "scale-count", SOUND.but(axis=2, weight_scale=np.ones(64)).model(), W, SOUND.model()
    ),
    "contrib quantizer": Case("operator-contrib", contrib(), "q.QuantizeLinear", SOUND.model()),
    "contrib zero point": Case("zero-point-not-zero", contrib(3), "q.QuantizeLinear", contrib()),
    "fp8 zero point": Case("zero-point-not-zero", float8(1.0).model(), Q, float8().model()),
    "residual": Case("residual-quantized", residual(), Q, residual(quantize=False)),
    "scores": Case("attention-products-quantized", scores(), Y, scores(both=False)),
    "scale per input": Case("weight-scale-per-input", SOUND.but(axis=0).model(), Y, SOUND.model()),
    "scale per input of a gemm": Case(
        "weight-scale-per-input",
        SOUND.but(op="Gemm", attributes={"transB": 1}, axis=1).model(),
        "y.Gemm",
        SOUND.but(op="Gemm", attributes={"transB": 1}, axis=0).model(),
    ),
    "scale per expert": Case(
        "stacked-weight-scale",
        SOUND.but(weight=ints(4, 64, 48), axis=0, leading=(4, "rows")).model(),
        Y,
        SOUND.but(weight=ints(4, 64, 48), axis=2, leading=(4, "rows")).model(),
    ),
    "scale per input of a stack": Case(
        "weight-scale-per-input",
        SOUND.but(weight=ints(4, 64, 48), axis=1, leading=(4, "rows")).model(),
        Y,
        SOUND.but(weight=ints(4, 64, 48), axis=-1, leading=(4, "rows")).model(),
    ),
    "half scales": Case("half-scales", SOUND.but(scale_type=np.float16, input_type=HALF).model(), Y, SOUND.model()),
    "casts": Case("cast-before-product", SOUND.but(cast=HALF).model(), Y, SOUND.model()),
    "weights only": Case("weights-only", WEIGHTS_ONLY.model(), Y, SOUND.model()),
    "weights only, rounded": Case("weights-only-rounded", WEIGHTS_ONLY.model(), Y, WEIGHTS_ONLY.but(axis=0).model()),
    "activation only": Case("activation-only", SOUND.but(quantize_weight=False).model(), Y, SOUND.model()),
    "small": Case("small-product", SOUND.but(weight=ints(64, 8)).model(), Y, SOUND.but(weight=ints(64, 16)).model()),
    "gemm": Case(
        "gemm-zero-point",
        SOUND.but(op="Gemm").model(),
        "y.Gemm",
        SOUND.but(op="Gemm", weight_zero_point=np.zeros(64, np.int8)).model(),
    ),
    "branch": Case("branch-constants", branched(inside=False), Y, branched(inside=True)),
    "bfloat16": Case("bfloat16-on-cpu", bfloat16(), Y, bfloat16(HALF)),
    "unnamed": Case("product-name", named("a", "", "c"), "(unnamed, makes y_b)", named("a", "b", "c")),
    "plus": Case("product-name", named("a", "b+b", "c"), "b+b", named("a", "b", "c")),
    "same name": Case("duplicate-name", named("a", "b", "b"), "b", named("a", "b", "c")),
    "causal": Case(
        "attention-causal",
        attention(mask=False, is_causal=1),
        A,
        attention((1, 4, "s", 64), (1, 4, "s", 64), mask=False, is_causal=1),  # as many queries as keys
    ),
    "nonpad": Case("attention-nonpad", attention(**NONPAD), A, attention()),
    "softcap": Case("attention-attribute", attention(softcap=30.0), A, attention(softcap=0.0)),
    "softmax precision": Case("attention-attribute", attention(softmax_precision=FLOAT), A, attention()),
    "past": Case("attention-past", attention(**PAST), A, attention()),
    "outputs": Case("attention-outputs", attention(outputs=3), A, attention()),
    "3-D": Case(
        "attention-rank",
        attention((1, "s", 256), (1, "k", 256), q_num_heads=4, kv_num_heads=4),
        A,
        attention(),
    ),
    "4 heads on 3": Case("attention-heads", attention(keys=(1, 3, "k", 64)), A, attention(keys=(1, 2, "k", 64))),
    "value size": Case("attention-heads", attention(values=(1, 4, "k", 32)), A, attention()),
    "head of 512": Case("attention-head-size", attention((1, 4, "s", 512), (1, 4, "k", 512)), A, attention()),
    "head of 20": Case(
        "attention-head-size",
        attention((1, 4, "s", 20), (1, 4, "k", 20)),
        A,
        attention((1, 4, "s", 24), (1, 4, "k", 24)),
    ),
    "float32 attention": Case("attention-float32", attention(elem=FLOAT), A, attention()),
    "decomposable": Case("attention-decomposable", decomposed(), A, decomposed(set_=False)),
    "attention operands": Case("attention-operands-quantized", quantized_attention(), A, quantized_attention(False)),
    "rotary tables": Case("rotary-table-type", rotary(np.float32), "y.RotaryEmbedding", rotary()),
    "int32 positions": Case("index-type", rotary(positions=TensorProto.INT32), "y.RotaryEmbedding", rotary()),
    "int32 indices": Case("index-type", scatter(indices=TensorProto.INT32), S, scatter()),
    "3-D cache": Case("scatter-form", scatter(cache=("b", 32, 16), update=("b", "s", 16)), S, scatter(axis=-2)),
    "axis 1": Case("scatter-form", scatter(axis=1), S, scatter(axis=2)),
    "circular": Case("scatter-form", scatter(mode="circular"), S, scatter(mode="linear")),
    "int8 cache": Case("scatter-form", scatter(elem=TensorProto.INT8), S, scatter(elem=TensorProto.BFLOAT16)),
    "capacity": Case("scatter-capacity", scatter(cache=("b", 2, "m", 16)), S, scatter()),
    "cache no input": Case("scatter-place", scatter(is_input=False), S, scatter()),
    "cache no output": Case("scatter-place", scatter(is_output=False), S, scatter()),
    "two scatters": Case("scatter-shared", scatter(twice=True), "second.TensorScatter", scatter()),
    "copied cache": Case("scattered-cache-copied", scatter(copied=True), S, scatter()),
    "dynamic heads": Case("cache-shape", cache(heads="h"), "past_key_values.0.key", cache()),
    "no present": Case("cache-shape", cache(present="present.1.key"), "past_key_values.0.key", cache()),
    "other channels": Case("cache-shape", cache(channels=32), "past_key_values.0.key", cache()),
    "other type": Case("cache-shape", cache(elem=FLOAT), "past_key_values.0.key", cache()),
    "dynamic quantizer": Case(
        "operator-missing",
        graph(
            [node("DynamicQuantizeLinear", ["x"], ["y", "s", "z"])],
            [value("x", FLOAT, ["b", 8])],
            [value("y", TensorProto.UINT8, None)],
        ),
        "y.DynamicQuantizeLinear",
        unary("Relu"),
    ),
    "contrib": Case("operator-domain", unary("QuickGelu", "com.microsoft"), "y.QuickGelu", unary("Gelu")),
    "foreign": Case("operator-domain", unary("Foo", "my.ops"), "y.Foo", unary("Relu")),
    "contrib Gelu": Case("operator-contrib", unary("Gelu", "com.microsoft"), "y.Gelu", unary("Gelu")),
    "trt domain": Case("operator-tensorrt-only", unary("TRT_Attention", "trt"), "y.TRT_Attention", unary("Relu")),
    "trt lengths": Case("operator-tensorrt-narrow", trt_attention(lengths=True), "y.TRT_Attention", trt_attention()),
    "trt experts": Case("operator-tensorrt-narrow", unary("TRT_MoE", "trt"), "y.TRT_MoE", trt_attention()),
    "topk": Case("topk-size", topk(3841), "y.TopK", topk(3840)),
    "scatter add": Case(
        "scatter-reduction", scattered("ScatterND", "add"), "y.ScatterND", scattered("ScatterND", "none")
    ),
    "scatter elements add": Case(
        "scatter-reduction",
        scattered("ScatterElements", "max"),
        "y.ScatterElements",
        scattered("ScatterElements", "none"),
    ),
    "nonzero": Case(
        "data-dependent-shape",
        graph([node("NonZero", ["x"], ["y"])], [value("x", FLOAT, ["b", 8])], [value("y", INT64, None)]),
        "y.NonZero",
        unary("Relu"),
    ),
    "opset 27": Case("version-too-new", versioned(27), "opset", versioned(26)),
    "ir 14": Case("version-too-new", versioned(24, 14), "IR version", versioned(24, 13)),
    "opset 21": Case("opset-old", versioned(21), "opset", versioned(22)),
    "fixed": Case(
        "fixed-shape",
        graph([node("Relu", ["x"], ["y"])], [value("x", FLOAT, [1, 8])], [value("y", FLOAT, None)]),
        "x",
        unary("Relu"),
    ),
}
