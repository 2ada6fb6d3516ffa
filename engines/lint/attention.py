"""Rules about Attention and rotary embeddings."""

from collections.abc import Iterator

from onnx import TensorProto

from spike_export.engines.lint.finding import Hit, Rule
from spike_export.engines.lint.operands import operand, type_name
from spike_export.engines.lint.view import Dimension, GraphModel, Node

_PAST_KEY, _PAST_VALUE, _NONPAD = 4, 5, 6
"""Inputs of Attention behind query, key, value and mask."""

_SMALLEST_HEAD, _LARGEST_HEAD, _HEAD_STEP = 16, 256, 8
"""Head sizes for which both prefill and decode have a fused kernel (tests/engines/lint/test_proofs.py)."""

_DECOMPOSABLE = "TRT_decomposable"


def _size(node: Node, index: int, axis: int) -> Dimension:
    """Return a size of a 4-D operand; None where it is unknown."""
    shape = node.input_type(index).shape
    return shape[axis] if shape is not None and len(shape) == 4 else None


def _lengths(node: Node) -> tuple[Dimension, Dimension]:
    """Return the number of queries and of keys; None where one is unknown."""
    queries, keys = (node.input_type(index).shape for index in (0, 1))
    return (queries[-2] if queries and len(queries) > 2 else None, keys[-2] if keys and len(keys) > 2 else None)


def _causal(model: GraphModel) -> Iterator[Hit]:
    for node in model.of("Attention"):
        queries, keys = _lengths(node)
        same = queries is not None and queries == keys
        if node.attribute("is_causal", 0) and (not same or node.input(_PAST_KEY)):
            yield Hit(
                "is_causal=1 means the upper left triangle in TensorRT, which is wrong with fewer queries than keys "
                "(decode, chunked prefill)",
                node,
            )


def _nonpad(model: GraphModel) -> Iterator[Hit]:
    for node in model.of("Attention"):
        if node.input(_NONPAD):
            yield Hit("TensorRT ignores nonpad_kv_seqlen without an error and attends to the padding", node)


def _refused_attributes(model: GraphModel) -> Iterator[Hit]:
    for node in model.of("Attention"):
        if float(node.attribute("softcap", 0.0)) != 0.0:
            yield Hit("TensorRT's importer refuses softcap", node)
        if node.attribute("softmax_precision") is not None:
            yield Hit("TensorRT's importer refuses softmax_precision", node)


def _past(model: GraphModel) -> Iterator[Hit]:
    for node in model.of("Attention"):
        if node.input(_PAST_KEY) or node.input(_PAST_VALUE):
            yield Hit("TensorRT's importer refuses past_key and past_value", node)


def _outputs(model: GraphModel) -> Iterator[Hit]:
    for node in model.of("Attention"):
        if len(node.proto.output) > 1:
            yield Hit(f"it has {len(node.proto.output)} outputs and TensorRT takes one", node)


def _ranks(model: GraphModel) -> Iterator[Hit]:
    for node in model.of("Attention"):
        shape = node.input_type(0).shape
        if shape is not None and len(shape) != 4:
            yield Hit(f"its query is {len(shape)}-D; TensorRT documents 4-D operands", node)


def _heads(model: GraphModel) -> Iterator[Hit]:
    for node in model.of("Attention"):
        queries, keys = _size(node, 0, 1), _size(node, 1, 1)
        if isinstance(queries, int) and isinstance(keys, int) and keys and queries % keys:
            yield Hit(f"{queries} query heads cannot be shared out to {keys} key heads", node)
        key, value = _size(node, 1, 3), _size(node, 2, 3)
        if isinstance(key, int) and isinstance(value, int) and key != value:
            yield Hit(f"its keys have {key} channels a head and its values {value}; TensorRT refuses that", node)


def _head_size(model: GraphModel) -> Iterator[Hit]:
    for node in model.of("Attention"):
        size = _size(node, 0, 3)
        if isinstance(size, int) and (size % _HEAD_STEP or not _SMALLEST_HEAD <= size <= _LARGEST_HEAD):
            yield Hit(
                f"there is no fused kernel for {size} channels a head; the build fails, or attention is taken apart",
                node,
            )


def _float32(model: GraphModel) -> Iterator[Hit]:
    for node in model.of("Attention"):
        if node.input_type(0).elem == TensorProto.FLOAT:
            yield Hit("float32 attention has no fused kernel in TensorRT: a file for ONNX Runtime", node)


def _decomposable(model: GraphModel) -> Iterator[Hit]:
    for node in model.of("Attention"):
        if node.attribute(_DECOMPOSABLE) is not None:
            yield Hit(f"ONNX Runtime refuses the attribute {_DECOMPOSABLE}", node)


def _quantized_operands(model: GraphModel) -> Iterator[Hit]:
    for node in model.of("Attention"):
        found = [index for index in (0, 1, 2) if operand(node, index).quantizer is not None]
        if found:
            yield Hit("quantized operands have INT8's error; the products themselves run in 16 bit", node)


def _rotary_types(model: GraphModel) -> Iterator[Hit]:
    for node in model.of("RotaryEmbedding"):
        value = node.input_type(0).elem
        tables = {elem for index in (1, 2) if (elem := node.input_type(index).elem)}
        if value and tables - {value}:
            other = ", ".join(sorted(type_name(elem) for elem in tables - {value}))
            yield Hit(f"its input is {type_name(value)} and its tables are {other}; every engine refuses that", node)


def _index_types(model: GraphModel) -> Iterator[Hit]:
    for op, index, name in (("RotaryEmbedding", 3, "position_ids"), ("TensorScatter", 2, "write_indices")):
        for node in model.of(op):
            if node.input_type(index).elem == TensorProto.INT32:
                yield Hit(f"its {name} are int32; TensorRT takes them, ONNX Runtime takes int64 only", node)


ATTENTION_RULES: tuple[Rule, ...] = (
    Rule(
        "attention-causal",
        "error",
        "Causal attention of fewer queries than keys",
        "give an explicit boolean mask instead of is_causal",
        _causal,
    ),
    Rule(
        "attention-nonpad",
        "error",
        "Attention with nonpad_kv_seqlen",
        "put the padding into the mask",
        _nonpad,
    ),
    Rule(
        "attention-attribute",
        "error",
        "An attribute of Attention that TensorRT refuses",
        "spell capped attention with MatMul, Tanh and Softmax; leave softmax_precision out",
        _refused_attributes,
    ),
    Rule(
        "attention-past",
        "error",
        "A cache inside Attention",
        "concatenate or scatter the cache in front of Attention",
        _past,
    ),
    Rule(
        "attention-outputs",
        "error",
        "Attention with more than one output",
        "make the present keys and values with Concat or TensorScatter",
        _outputs,
    ),
    Rule(
        "attention-rank",
        "warning",
        "Attention that is not 4-D",
        "reshape to [batch, heads, sequence, head_dim]",
        _ranks,
    ),
    Rule(
        "attention-heads",
        "error",
        "Head counts or sizes that do not fit each other",
        "let the query heads be a multiple of the key heads, and pad values to the keys' size",
        _heads,
    ),
    Rule(
        "attention-head-size",
        "warning",
        "A head size without fused kernel",
        f"pad heads to a multiple of {_HEAD_STEP} from {_SMALLEST_HEAD} to {_LARGEST_HEAD}",
        _head_size,
    ),
    Rule(
        "attention-float32",
        "note",
        "Attention in float32",
        "export in float16 or bfloat16 for TensorRT",
        _float32,
    ),
    Rule(
        "attention-decomposable",
        "warning",
        "An attribute that only TensorRT knows",
        "set it on TensorRT's copy of the graph, not in the file",
        _decomposable,
    ),
    Rule(
        "attention-operands-quantized",
        "note",
        "Attention with quantized operands",
        "leave them in 16 bit unless that error is what is studied, or the cache has to be small",
        _quantized_operands,
    ),
    Rule(
        "rotary-table-type",
        "error",
        "Rotary tables of another type than the input",
        "store cosines and sines in the input's type",
        _rotary_types,
    ),
    Rule(
        "index-type",
        "warning",
        "int32 positions or write indices",
        "use int64, which every engine takes",
        _index_types,
    ),
)
