"""INT8 products in ONNX Runtime against integer arithmetic, with values that saturating kernels get wrong."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from spike_export.engines.onnx_runtime import exact_products
from spike_export.engines.onnx_runtime.exact_products import EXACT_PRODUCTS, products_saturate, request_exact_products
from spike_export.engines.onnx_runtime.session import session_options

TERMS, COLUMNS = 576, 96


def quantized_product(weight: NDArray[np.int8]) -> onnx.ModelProto:
    """A linear as a bundle has it, with all scales 1, so that its result is an integer."""
    constants = {
        "one": np.float32(1),
        "zero": np.int8(0),
        "weight": weight,
        "scales": np.ones(COLUMNS, np.float32),
        "zeros": np.zeros(COLUMNS, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["quantized"]),
        helper.make_node("DequantizeLinear", ["quantized", "one", "zero"], ["restored"]),
        helper.make_node("DequantizeLinear", ["weight", "scales", "zeros"], ["matrix"], axis=1),
        helper.make_node("MatMul", ["restored", "matrix"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "rows", TERMS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "rows", COLUMNS])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)


def product(steps: NDArray[np.int64], weight: NDArray[np.int8], options: ort.SessionOptions) -> NDArray[np.float32]:
    model = quantized_product(weight).SerializeToString()
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    result: NDArray[np.float32] = session.run(None, {"x": steps[None].astype(np.float32)})[0][0]
    return result


@pytest.fixture(scope="module")
def weight() -> NDArray[np.int8]:
    return np.random.default_rng(0).integers(-127, 128, (TERMS, COLUMNS), np.int8)


@pytest.mark.usefixtures("denormals_as_before")
@pytest.mark.parametrize("rows", [1, 7, 64])  # vectors and matrices have kernels of their own
def test_a_session_of_ours_multiplies_as_integers_do(weight: NDArray[np.int8], rows: int) -> None:
    steps = np.random.default_rng(rows).integers(-128, 128, (rows, TERMS))
    expected = steps @ weight.astype(np.int64)
    assert np.abs(expected).max() < 1 << 24  # so that float32 holds it exactly
    np.testing.assert_array_equal(product(steps, weight, session_options(1)), expected)
    # The values are large enough to tell: with ONNX Runtime's own options such a processor is wrong almost everywhere.
    plain = product(steps, weight, ort.SessionOptions())
    assert (np.mean(plain != expected) > 0.5) == products_saturate()


@pytest.mark.parametrize("saturating", [True, False])
def test_the_option_is_set_where_products_saturate_only(monkeypatch: pytest.MonkeyPatch, saturating: bool) -> None:
    """Elsewhere it would replace the fastest kernels by slower ones."""
    monkeypatch.setattr(exact_products, "products_saturate", lambda: saturating)
    options = ort.SessionOptions()
    request_exact_products(options)
    if saturating:
        assert options.get_session_config_entry(EXACT_PRODUCTS) == "1"
    else:
        with pytest.raises(RuntimeError, match=EXACT_PRODUCTS):
            options.get_session_config_entry(EXACT_PRODUCTS)
