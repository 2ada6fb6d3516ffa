"""The engines really do what the linter says: what it calls refused is refused, what it calls slow is not fused.

Each claim is tried on the planted graph of tests/support/lint_cases.py and on the sound graph beside it.
"""

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from spike_export.engines.lint.operators import MISSING
from spike_export.engines.lint.view import TAKEN_AS_STANDARD
from spike_export.engines.onnx_runtime.exact_products import request_exact_products
from spike_export.engines.plan.backend import TENSORRT_RTX
from tests.support.built_plans import audit_plan
from tests.support.lint_cases import CASES, SOUND, WEIGHTS_ONLY, versioned
from tests.support.lint_graphs import FLOAT, HALF, Linear, attention, ints, siblings

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec(TENSORRT_RTX.module) is None,
    reason=f"TensorRT-RTX is not installed: {TENSORRT_RTX.install}",
)

DYNAMIC_SIZE = 8
"""What dynamic axes are built for."""


class Compiler:
    """TensorRT-RTX, building for SM86 on the CPU."""

    def __init__(self) -> None:
        import tensorrt_rtx

        self.trt: Any = tensorrt_rtx
        self.logger = tensorrt_rtx.Logger(tensorrt_rtx.Logger.INTERNAL_ERROR)

    def parsed(self, model: onnx.ModelProto) -> tuple[Any, Any, Any]:
        builder = self.trt.Builder(self.logger)
        network = builder.create_network(0)
        parser = self.trt.OnnxParser(network, self.logger)
        # The weights' bytes must outlive the build.
        return builder, network, parser if parser.parse(model.SerializeToString()) else None

    def plan(self, model: onnx.ModelProto, single: tuple[str, ...] = ()) -> bytes | None:
        """Return the plan, or None where the graph is refused; inputs in `single` have the size 1 in axis 2."""
        builder, network, parser = self.parsed(model)
        if parser is None:
            return None
        config = builder.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(self.trt.ComputeCapability.SM86, 0)
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            sizes = [DYNAMIC_SIZE if size < 0 else size for size in tensor.shape]
            if tensor.name in single:
                sizes[2] = 1
            profile.set_shape(tensor.name, sizes, sizes, sizes)
        config.add_optimization_profile(profile)
        built = builder.build_serialized_network(network, config)
        return None if built is None else bytes(memoryview(built))


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    return Compiler()


REFUSED_BY_TENSORRT = (
    "zero scale",
    "negative scale",
    "zero point 3",
    "weight zero point",
    "zero point input",
    "int16",
    "uint8 weight",
    "int32 bias",
    "scales of other channels",
    "axis that is not there",
    "contrib zero point",
    "gathered int8",
    "softcap",
    "softmax precision",
    "past",
    "outputs",
    "4 heads on 3",
    "value size",
    "head of 512",
    "head of 20",
    "float32 attention",
    "rotary tables",
    "3-D cache",
    "axis 1",
    "circular",
    "int8 cache",
    "capacity",
    "cache no input",
    "cache no output",
    "two scatters",
    "dynamic quantizer",
    "contrib",
    "foreign",
    "topk",
    "scatter add",
    "scatter elements add",
)


@needs_rtx
@pytest.mark.parametrize("name", REFUSED_BY_TENSORRT)
def test_tensorrt_refuses_the_fault_and_takes_the_sound_graph(compiler: Compiler, name: str) -> None:
    assert compiler.plan(CASES[name].planted) is None
    assert compiler.plan(CASES[name].sound) is not None


@needs_rtx
@pytest.mark.parametrize("size", [8, 16, 24, 80, 256, 264])
def test_head_sizes_with_a_fused_kernel(compiler: Compiler, size: int) -> None:
    model = attention((1, 4, "s", size), (1, 4, "k", size))
    fused = [compiler.plan(model, single) is not None for single in ((), ("q", "mask"))]
    assert all(fused) is (16 <= size <= 256)
    assert size != 8 or fused == [False, True]  # a kernel for one query only


@needs_rtx
@pytest.mark.parametrize(("opset", "ir_version"), [(13, 11), (21, 11), (27, 11), (24, 8), (24, 14)])
def test_tensorrt_parses_more_versions_than_it_documents(compiler: Compiler, opset: int, ir_version: int) -> None:
    assert compiler.plan(versioned(opset, ir_version)) is not None


def precision(compiler: Compiler, model: onnx.ModelProto, folder: Path, *names: str) -> set[str]:
    """Return the precisions that the plan's audit finds for the products that make these values."""
    plan = compiler.plan(model)
    assert plan is not None
    (folder / "plan").write_bytes(plan)
    audit = audit_plan(folder / "plan", dict.fromkeys(names or ("y",), "int8"))
    return {found for module in audit.modules for found in module.found}


FALLS_BACK = (
    "scale at run time",
    "activation channels",
    "scale per input",
    "scale per expert",
    "scale per input of a stack",
    "activation only",
    "weights only",
)


@needs_rtx
@pytest.mark.parametrize("name", FALLS_BACK)
def test_tensorrt_falls_back_without_saying_so(compiler: Compiler, name: str, tmp_path: Path) -> None:
    assert "int8" not in precision(compiler, CASES[name].planted, tmp_path)
    assert precision(compiler, CASES[name].sound, tmp_path) == {"int8"}


@needs_rtx
def test_a_scale_that_differs_in_the_last_bit_is_not_merged(compiler: Compiler) -> None:
    last_bit = float(np.nextafter(np.float32(0.02), np.float32(1)))
    merged = [compiler.plan(siblings((0.02, scale, 0.02), size=512)) for scale in (0.02, last_bit)]
    assert [plan is not None and plan.count(b"y_b.MatMul+") > 0 for plan in merged] == [True, False]


@needs_rtx
def test_the_table_of_missing_operators_is_the_importers(compiler: Compiler) -> None:
    _, _, parser = compiler.parsed(SOUND.model())
    standard = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    assert set(MISSING) == {name for name in standard if not parser.supports_operator(name)}
    assert compiler.plan(CASES["contrib Gelu"].planted) is not None
    assert all(parser.supports_operator(name) for name in TAKEN_AS_STANDARD)


def session(model: onnx.ModelProto, optimized: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        # Asked for only where both operands are INT8: it also changes what becomes of an INT8 weight alone.
        request_exact_products(options)
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(model: onnx.ModelProto) -> Any:
    made = session(model)
    random = np.random.default_rng(0)
    feeds: dict[str, Any] = {}
    for value in made.get_inputs():
        shape = [size if isinstance(size, int) else DYNAMIC_SIZE for size in value.shape]
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
        feeds[value.name] = random.standard_normal(shape).astype(kinds[value.type])
    return made.run(None, feeds)[0]


REFUSED_BY_ONNX_RUNTIME = (
    "half into float scale",
    "int8 blocks",
    "scale per expert",
    "bfloat16",
    "same name",
    "decomposable",
    "rotary tables",
    "int32 positions",
    "int32 indices",
    "foreign",
    "opset 27",
    "ir 14",
)


@pytest.mark.parametrize("name", REFUSED_BY_ONNX_RUNTIME)
def test_onnx_runtime_refuses_the_fault_and_loads_the_sound_graph(name: str) -> None:
    with pytest.raises(Exception, match="ONNXRuntimeError"):
        run(CASES[name].planted)
    session(CASES[name].sound)


def kinds(model: onnx.ModelProto, folder: Path) -> Counter[str]:
    """Return the operators that ONNX Runtime makes of a graph."""
    session(model, folder / "optimized.onnx")
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def fused(model: onnx.ModelProto, folder: Path) -> int:
    found = kinds(model, folder)
    return sum(found[name] for name in ("MatMulIntegerToFloat", "QLinearMatMul", "QGemm"))


NOT_FUSED_BY_ONNX_RUNTIME = {
    "no zero point": 1,
    "restored in half": 1,
    "shared": 3,
    "one zero point": 3,
    "half scales": 1,
    "casts": 1,
    "activation only": 1,
    "gemm": 1,
    "activation channels": 1,
}
"""Case → how many products the sound graph has fused."""


@pytest.mark.parametrize("name", NOT_FUSED_BY_ONNX_RUNTIME)
def test_onnx_runtime_leaves_the_product_in_floating_point(name: str, tmp_path: Path) -> None:
    assert fused(CASES[name].planted, tmp_path) == 0
    assert fused(CASES[name].sound, tmp_path) == NOT_FUSED_BY_ONNX_RUNTIME[name]


def test_onnx_runtime_makes_a_gemm_of_a_product_and_its_bias(tmp_path: Path) -> None:
    found = kinds(CASES["int32 bias"].sound, tmp_path)
    assert (found["Gemm"], found["MatMulIntegerToFloat"]) == (1, 0)


def test_onnx_runtime_fuses_in_a_branch_only_what_has_its_constants_there(tmp_path: Path) -> None:
    for name, expected in (("planted", 0), ("sound", 1)):
        session(getattr(CASES["branch"], name), tmp_path / "optimized.onnx")
        (chosen,) = (n for n in onnx.load(tmp_path / "optimized.onnx").graph.node if n.op_type == "If")
        found = Counter(n.op_type for attribute in chosen.attribute for n in attribute.g.node)
        assert found["MatMulIntegerToFloat"] == expected


def error(linear: Linear, per_row: bool) -> float:
    """Return how far ONNX Runtime's product is from the definition, as a part of the largest result."""
    shape = (*linear.weight.shape[:-2], DYNAMIC_SIZE, linear.weight.shape[-2])
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    left = np.clip(np.round(x / np.float32(0.02)), -128, 127) * 0.02 if linear.quantize_input else x
    scales = np.asarray(linear.weight_scale)
    expected = left @ (linear.weight * (scales[:, None] if per_row else scales))
    actual = session(linear.model()).run(None, {"x": x})[0]
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def test_onnx_runtime_takes_scales_of_inputs_for_scales_of_outputs_in_a_square_weight() -> None:
    scales = np.random.default_rng(1).uniform(0.001, 0.02, 64).astype(np.float32)
    assert error(SOUND.but(weight_scale=scales), per_row=False) < 1e-5
    assert error(SOUND.but(weight_scale=scales, axis=0), per_row=True) > 0.1
    with pytest.raises(Exception, match="MatMulIntegerToFloat"):
        run(SOUND.but(weight=ints(64, 48), axis=0).model())


@pytest.mark.parametrize("shape", [(4, 48, 64), (4, 64, 64), (4, 64, 48)])
def test_onnx_runtime_takes_stacked_weights_with_scales_per_output(shape: tuple[int, ...]) -> None:
    scales = np.random.default_rng(1).uniform(0.001, 0.02, shape[2]).astype(np.float32)
    assert error(SOUND.but(weight=ints(*shape), axis=2, weight_scale=scales, leading=(4, "rows")), per_row=False) < 1e-5


def test_onnx_runtime_rounds_the_input_of_a_plain_int8_weight(tmp_path: Path) -> None:
    scales = np.random.default_rng(1).uniform(0.001, 0.02, 64).astype(np.float32)
    assert kinds(WEIGHTS_ONLY.model(), tmp_path)["MatMulNBits"] == 1
    assert kinds(WEIGHTS_ONLY.but(axis=0).model(), tmp_path)["MatMulNBits"] == 0
    assert error(WEIGHTS_ONLY.but(weight_scale=scales), per_row=False) > 1e-3
    assert error(WEIGHTS_ONLY.but(weight_scale=scales, axis=0), per_row=True) < 1e-5


@needs_rtx
@pytest.mark.parametrize("zero_point", [np.uint8(0), None])
def test_tensorrt_takes_uint8_for_int8_and_onnx_runtime_does_not(compiler: Compiler, zero_point: Any) -> None:
    """TensorRT builds the graph; ONNX's own meaning cuts all negative values off."""
    model = SOUND.but(zero_point=zero_point).model()
    assert compiler.plan(model) is not None
    negative = -np.ones((DYNAMIC_SIZE, 64), np.float32)
    assert not session(model).run(None, {"x": negative})[0].any()
    assert session(SOUND.model()).run(None, {"x": negative})[0].any()


@needs_rtx
@pytest.mark.parametrize("name", ["infinite scale", "nonpad", "causal", "scalar", "int8 blocks", "3-D", "casts"])
def test_tensorrt_takes_these_without_a_word(compiler: Compiler, name: str) -> None:
    """So only the linter tells."""
    assert compiler.plan(CASES[name].planted) is not None


@needs_rtx
def test_float_attention_in_half_is_fused(compiler: Compiler) -> None:
    assert compiler.plan(attention(elem=HALF)) is not None
    assert compiler.plan(attention(elem=FLOAT, TRT_decomposable=1)) is not None
