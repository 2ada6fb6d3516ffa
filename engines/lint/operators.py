"""Rules about operators that an engine lacks, or takes in part, and about versions."""

from collections.abc import Iterator, Mapping

import numpy as np

from spike_export.engines.lint.finding import Hit, Rule
from spike_export.engines.lint.view import STANDARD_DOMAINS, GraphModel, Node

LARGEST_TOPK = 3840
"""TensorRT refuses a larger K."""

_DIRECT = "quantize with QuantizeLinear and DequantizeLinear only"
_STATIC = "keep shapes and types static: compute it outside the graph, or with masks"
_SPELLED = "spell it with elementary operators"

MISSING: Mapping[str, str] = {
    **dict.fromkeys(("ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul"), _DIRECT),
    **dict.fromkeys(
        (
            "Compress",
            "ConcatFromSequence",
            "Optional",
            "OptionalGetElement",
            "OptionalHasElement",
            "SequenceAt",
            "SequenceConstruct",
            "SequenceEmpty",
            "SequenceErase",
            "SequenceInsert",
            "SequenceLength",
            "SequenceMap",
            "SplitToSequence",
            "Unique",
        ),
        _STATIC,
    ),
    **dict.fromkeys(
        (
            "AffineGrid",
            "Bernoulli",
            "BitCast",
            "BitShift",
            "BitwiseAnd",
            "BitwiseNot",
            "BitwiseOr",
            "BitwiseXor",
            "CenterCropPad",
            "Col2Im",
            "CumProd",
            "DFT",
            "DeformConv",
            "Det",
            "ImageDecoder",
            "MaxRoiPool",
            "MaxUnpool",
            "MelWeightMatrix",
            "Multinomial",
            "NegativeLogLikelihoodLoss",
            "RegexFullMatch",
            "SoftmaxCrossEntropyLoss",
            "StringConcat",
            "StringNormalizer",
            "StringSplit",
            "SwiGLU",
            "TfIdfVectorizer",
        ),
        _SPELLED,
    ),
}
"""Standard operator that TensorRT's importer lacks → what to do (tests/engines/lint/test_proofs.py compares)."""

_DATA_DEPENDENT = ("NonZero", "NonMaxSuppression")

_TENSORRT_DOMAIN = "trt"

_NARROW: Mapping[str, str] = {
    "TRT_MoE": "it runs on compute capability 10.0, 10.3 and 11.0 only, and has no INT8",
    "TRT_QuantizedAttention": "TensorRT-RTX 1.7 builds it neither in INT8 nor in FP8",
}
"""TensorRT's own operator → why it does not serve."""

_LENGTHS = (4, 5, 6, 7)
"""Inputs of TRT_Attention that hold lengths in one version or another."""

_OLDEST_OPSET, _NEWEST_OPSET, _NEWEST_IR = 22, 26, 13
"""What TensorRT-RTX documents as oldest, and what ONNX Runtime 1.31 reads at most."""


def _missing(model: GraphModel) -> Iterator[Hit]:
    for node in model.nodes:
        if node.op in MISSING and not _is_local(model, node):
            yield Hit(f"TensorRT has no {node.op}: {MISSING[node.op]}", node)


def _foreign(model: GraphModel) -> Iterator[Hit]:
    for node in model.nodes:
        domain = node.proto.domain
        if domain in (*STANDARD_DOMAINS, _TENSORRT_DOMAIN) or _is_local(model, node) or node.is_taken_as_standard:
            continue
        yield Hit(f"it is of the domain {domain!r}, which TensorRT knows through plugins only", node)


def _contrib(model: GraphModel) -> Iterator[Hit]:
    for node in model.nodes:
        if node.is_taken_as_standard and not _is_local(model, node):
            yield Hit("it is ONNX Runtime's own operator; TensorRT takes it for the standard one of that name", node)


def _is_local(model: GraphModel, node: Node) -> bool:
    """Whether a node calls a function of the model itself."""
    return (node.proto.domain, node.proto.op_type) in model.functions


def _tensorrt_only(model: GraphModel) -> Iterator[Hit]:
    for node in model.nodes:
        if node.proto.domain == _TENSORRT_DOMAIN and not _is_local(model, node):
            yield Hit("ONNX Runtime does not know TensorRT's own operator", node)


def _narrow(model: GraphModel) -> Iterator[Hit]:
    for node in model.nodes:
        if node.proto.domain != _TENSORRT_DOMAIN:
            continue
        if node.proto.op_type in _NARROW:
            yield Hit(_NARROW[node.proto.op_type], node)
        if node.proto.op_type == "TRT_Attention" and any(node.input(index) for index in _LENGTHS):
            yield Hit(
                "lengths are at other inputs in other versions, where a wrong one is ignored; TensorRT 11.1 and 11.2 "
                "fail with them in float16 and return wrong results in bfloat16",
                node,
            )


def _topk(model: GraphModel) -> Iterator[Hit]:
    for node in model.of("TopK"):
        count = node.constant(1)
        if count is not None and count.size and int(np.max(count)) > LARGEST_TOPK:
            yield Hit(f"K is {int(np.max(count))} and TensorRT takes at most {LARGEST_TOPK}", node)


def _reductions(model: GraphModel) -> Iterator[Hit]:
    for node in model.of("ScatterElements", "ScatterND"):
        reduction = node.attribute("reduction", "none")
        if reduction != "none":
            yield Hit(f"TensorRT refuses its reduction {reduction!r}", node)


def _data_dependent(model: GraphModel) -> Iterator[Hit]:
    for node in model.of(*_DATA_DEPENDENT):
        if not node.scope.is_constant(node.proto.output[0]):
            yield Hit("the size of its result depends on the data: no CUDA graph, and the host waits", node)


def _versions(model: GraphModel) -> Iterator[Hit]:
    proto = model.file.model
    opset = next((entry.version for entry in proto.opset_import if entry.domain in STANDARD_DOMAINS), None)
    if opset is not None and opset > _NEWEST_OPSET:
        yield Hit(f"opset {opset} is newer than ONNX Runtime reads, {_NEWEST_OPSET}", subject="opset")
    if proto.ir_version > _NEWEST_IR:
        yield Hit(f"IR version {proto.ir_version} is newer than ONNX Runtime reads, {_NEWEST_IR}", subject="IR version")


def _old_opset(model: GraphModel) -> Iterator[Hit]:
    entries = model.file.model.opset_import
    opset = next((entry.version for entry in entries if entry.domain in STANDARD_DOMAINS), None)
    if opset is not None and opset < _OLDEST_OPSET:
        yield Hit(f"opset {opset} is older than TensorRT-RTX documents, {_OLDEST_OPSET}", subject="opset")


OPERATOR_RULES: tuple[Rule, ...] = (
    Rule(
        "operator-missing",
        "error",
        "An operator that TensorRT lacks",
        "replace it as the reason says",
        _missing,
    ),
    Rule(
        "operator-domain",
        "error",
        "An operator of a domain that TensorRT does not know",
        "replace it by standard operators, add it as a local function, or supply a plugin",
        _foreign,
    ),
    Rule(
        "operator-contrib",
        "warning",
        "An operator of ONNX Runtime's domain",
        "use the standard operator of opset 23 or 24, which every engine takes",
        _contrib,
    ),
    Rule(
        "operator-tensorrt-only",
        "warning",
        "An operator of TensorRT's domain without a body",
        "add a local function of that name whose body is standard operators",
        _tensorrt_only,
    ),
    Rule(
        "operator-tensorrt-narrow",
        "warning",
        "An operator of TensorRT's domain that few versions or GPUs run",
        "use Attention with an explicit mask, and one product per expert",
        _narrow,
    ),
    Rule("topk-size", "error", "A TopK of too many", f"take at most {LARGEST_TOPK}", _topk),
    Rule(
        "scatter-reduction",
        "error",
        "A scatter with a reduction",
        "scatter one-to-one, or multiply with a one-hot matrix",
        _reductions,
    ),
    Rule(
        "data-dependent-shape",
        "note",
        "A result whose size depends on the data",
        "compute densely with a mask",
        _data_dependent,
    ),
    Rule(
        "version-too-new", "warning", "An opset or IR version that is too new", "export for opset 24, IR 11", _versions
    ),
    Rule("opset-old", "note", "An old opset", "convert the model to opset 24 where a build refuses it", _old_opset),
)
