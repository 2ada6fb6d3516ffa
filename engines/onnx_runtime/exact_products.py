"""INT8 products of ONNX Runtime that are exact on every processor (docs/decisions/exact-products.md)."""

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnxruntime as ort

EXACT_PRODUCTS = "session.x64quantprecision"
"""Session option: `1` lets ONNX Runtime hold INT8 weights as UINT8, whose kernels never saturate."""

_ROWS, _TERMS, _COLUMNS = 4, 64, 64
_INPUT, _WEIGHT = 255, 127


def request_exact_products(options: "ort.SessionOptions") -> None:
    """Set the option where this processor needs it; elsewhere it would only take the fastest kernels away."""
    if products_saturate():
        options.add_session_config_entry(EXACT_PRODUCTS, "1")


@cache
def products_saturate() -> bool:
    """Return whether ONNX Runtime multiplies UINT8 by INT8 wrongly on this processor.

    Without VNNI instructions its x86 kernels add two products in 16 bits, which hold 32,767 at most. One product of the
    largest values, where a pair comes to 64,770, tells: which processors are affected changes with ONNX Runtime's
    version.
    """
    import numpy as np

    inputs, session = np.full((_ROWS, _TERMS), _INPUT, np.uint8), _product()
    return any(
        bool((session.run(None, {"inputs": rows})[0] != _TERMS * _INPUT * _WEIGHT).any())
        for rows in (inputs, inputs[:1])  # a matrix and a vector have kernels of their own
    )


def _product() -> Any:
    """Return a session: `inputs` [rows, terms] uint8 → their product [rows, columns] int32 with an INT8 weight."""
    import numpy as np
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["inputs", "weight"], ["product"])],
        "probe",
        [helper.make_tensor_value_info("inputs", TensorProto.UINT8, ["rows", _TERMS])],
        [helper.make_tensor_value_info("product", TensorProto.INT32, ["rows", _COLUMNS])],
        [numpy_helper.from_array(np.full((_TERMS, _COLUMNS), _WEIGHT, np.int8), "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
