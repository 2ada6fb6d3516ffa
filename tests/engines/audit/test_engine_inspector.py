"""The engine inspector's document, in the form TensorRT 10 and later print it for a transformer.

The form (fields, types of layers, `[profile N]`, separators in the metadata, names of kernels) is that of NVIDIA's
Engine Explorer, which reads such documents, and of the layer listing in NVIDIA/TensorRT#4397. None was made here.
"""

import ast
import importlib
import importlib.util
import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spike_export.artifacts.errors import EngineError
from spike_export.engines.audit import engine_inspector
from spike_export.engines.audit.engine_inspector import inspect_engine, read_layer_information
from spike_export.engines.audit.reading import NOT_FOUND, WEIGHT_ONLY
from spike_export.engines.audit.verdict import judge
from spike_export.engines.plan.backend import BACKENDS, Backend

LAYER = "model.layers.0"
Q, K, V, OUT = (f"{LAYER}.self_attn.{name}_proj" for name in "qkvo")
UP, DOWN = f"{LAYER}.mlp.up_proj", f"{LAYER}.mlp.down_proj"

INT8_KERNEL = "sm80_xmma_gemm_i8f32_i8i32_f32_tn_n_tilesize64x64x64_stage4_warpsize2x2x1_tensor16x8x32"
HALF_KERNEL = "sm80_xmma_gemm_f16f16_f16f16_f16_nn_n_tilesize32x32x64_stage6_warpsize2x2x1_tensor16x8x16"


def tensor(kind: str) -> dict[str, Any]:
    return {"Name": "__mye1", "Location": "Device", "Dimensions": [1, 1, 64], "Format/Datatype": kind}


def layer(name: str, kind: str, inputs: tuple[str, ...], tactic: str, *nodes: str) -> dict[str, Any]:
    return {
        "Name": name,
        "LayerType": kind,
        "Inputs": [tensor(each) for each in inputs],
        "Outputs": [tensor("Float")],
        "TacticName": tactic,
        "StreamId": 0,
        "Metadata": "\x1e".join(f"[ONNX Layer: {node}]" for node in nodes),
    }


def matmul(module: str) -> str:
    return f"{module}.MatMul"


def decoder(mark: str = "", graph: int = 0) -> list[dict[str, Any]]:
    """One layer: q, k and v merged, attention, o, the feed-forward block's up and down, as INT8 but down."""
    qkv = "+".join(f"{matmul(module)}{mark}" for module in (V, K, Q))
    norm = f"{LAYER}.input_layernorm.RMSNormalization"
    attention = f"{LAYER}.self_attn.Attention"
    return [
        layer("shape_call", "shape_call", (), ""),
        layer(f"__myl_Norm_myl{graph}_1", "kgen", ("Half",), "__myl_Norm_0x1", norm, f"{Q}.QuantizeLinear"),
        layer(f"{qkv}_myl{graph}_2", "gemm", ("Int8",), INT8_KERNEL, matmul(V), matmul(K), matmul(Q)),
        # Rotates, and multiplies with the scales: it names the product but computes none.
        layer(f"__myl_MulCast_myl{graph}_3", "kgen", ("Float",), "__myl_MulCast_0x2", matmul(Q), matmul(K)),
        layer(f"_gemv_mha_v1_myl{graph}_4", "kgen", ("Half", "Half"), "_gemv_mha_v1_0x3", attention),
        layer("wait", "wait", (), ""),
        layer(f"{matmul(OUT)}{mark}_myl{graph}_5", "gemm", ("Int8",), INT8_KERNEL, matmul(OUT)),
        layer(f"__myl_FcMulAdd_myl{graph}_6", "fusion", ("Int8", "Int8", "Float"), INT8_KERNEL, matmul(UP)),
        layer(f"{matmul(DOWN)}{mark}_myl{graph}_7", "gemm", ("Half",), HALF_KERNEL, matmul(DOWN)),
    ]


def document(*layers: dict[str, Any] | str) -> str:
    return json.dumps({"Layers": list(layers), "Bindings": ["input_ids", "input_ids [profile 1]"]})


PLANNED = {Q: "int8", K: "int8", V: "int8", OUT: "int8", UP: "int8", DOWN: "float16"}


def test_an_engine_that_runs_as_planned() -> None:
    audit = judge(read_layer_information(document(*decoder()), "tensorrt 11.4.0"), PLANNED)
    assert audit.deviations == ()
    assert (audit.profiles, audit.int8_products, audit.other_products) == (1, 3, 1)
    (program,) = audit.programs
    assert program.fused == ((V, K, Q),)
    assert program.attention == {"_gemv_mha_v1": 1}
    assert program.layer_kernels == (7,)  # without those that launch nothing
    assert audit.evidence.sentence == "told by the engine inspector of tensorrt 11.4.0"


def test_each_profile_is_judged_alone() -> None:
    """Generated kernels of the second profile bear no mark; they belong to its graph."""
    second = decoder(" [profile 1]", graph=1)
    second[6]["TacticName"], second[6]["Inputs"] = HALF_KERNEL, [tensor("Half")]
    reading = read_layer_information(document(*decoder(), *second))
    assert [(program.profile, len(program.kernels)) for program in reading.programs] == [(0, 7), (1, 7)]
    audit = judge(reading, PLANNED)
    assert [(module.module, module.found) for module in audit.deviations] == [(OUT, ("float16", "int8"))]
    assert [program.attention for program in audit.programs] == [{"_gemv_mha_v1": 1}] * 2


@pytest.mark.parametrize(
    ("kind", "inputs", "tactic", "found"),
    [
        ("gemm", ("Int8",), "sm80_xmma_gemm_i8i8_i8i32_f32_tn_n_tilesize64x64x64", "int8"),
        ("gemm", ("Int8",), "sm90_xmma_gemm_i8i32_i8i32_i32_tn_n_tilesize256x128x128", "int8"),
        ("gemm", ("Row major Int8 format", "Row major linear FP16 format"), "cutlass_imma", "int8"),
        ("fusion", ("Int8", "Int8"), "sm80_xmma_gemm_i8i8_i8i32_f32_tn_n_by_fusion_tactic", "int8"),
        ("gemm", ("FP8",), "sm89_xmma_gemm_e4m3f32_e4m3f32_f32_tn_n_tilesize64x64x64", "fp8"),
        ("gemm", ("Half",), HALF_KERNEL, "float16"),
        ("gemm", ("BFloat16",), "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "bfloat16"),
        ("gemm", ("Float",), "sm80_xmma_gemm_f32f32_tf32f32_f32_nn_n", "float32"),
        ("gemm", ("Half",), "ampere_h16816gemm_256x128_ldg8_nn_v1", "float16"),
        ("gemm", ("Half", "Int8"), HALF_KERNEL, WEIGHT_ONLY),
        ("fusion", ("Int8", "Half"), "sm80_xmma_gemm_f16f16_f16f16_f16_nn_n_by_fusion_tactic", WEIGHT_ONLY),
        ("fusion", ("Int8", "Half"), "generated_gemm", WEIGHT_ONLY),
        # A generated kernel is never believed to multiply INT8 with INT8.
        ("kgen", ("Int8", "Int8"), "__myl_MulSum_0x1", WEIGHT_ONLY),
        ("kgen", ("Half",), "__myl_MulSum_0x1", "float16"),
        ("gemm", (), "", "unknown"),
    ],
)
def test_the_precision_of_a_product(kind: str, inputs: tuple[str, ...], tactic: str, found: str) -> None:
    reading = read_layer_information(document(layer("a_myl0_1", kind, inputs, tactic, matmul(UP))))
    assert reading.found == {UP: (found,)}


def test_a_module_that_no_layer_names_is_not_found() -> None:
    audit = judge(read_layer_information(document(*decoder())), {f"{LAYER}.mlp.gate_proj": "int8"})
    assert audit.deviations[0].found == (NOT_FOUND,)


@pytest.mark.parametrize("layers", [("{ForeignNode[a...b]}",), (decoder()[1], "names only"), ()])
def test_an_engine_that_tells_names_only_proves_nothing(layers: tuple[Any, ...]) -> None:
    reading = read_layer_information(document(*layers))
    assert reading.programs == ()
    assert "build it with detailed profiling verbosity" in reading.evidence.sentence


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Layer(Myelin): x", "is not JSON"),
        ("[]", "an unknown form"),
        ('{"layers": []}', "an unknown form: Layers: Field required"),
        ('{"Layers": [{"Name": "x"}]}', "an unknown form: Layers.0"),
    ],
)
def test_another_form_is_an_error(text: str, reason: str) -> None:
    with pytest.raises(EngineError, match=reason):
        read_layer_information(text)


class Bindings(SimpleNamespace):
    """As much of TensorRT as an inspection uses; `engine` is what loading a plan gives."""

    def __init__(self, engine: Any) -> None:
        self.loaded: list[bytes] = []
        self.formats: list[Any] = []

        class Logger:
            INTERNAL_ERROR, ERROR, WARNING = range(3)

        class Runtime:
            def __init__(self, logger: Any) -> None:
                self.logger = logger

            def deserialize_cuda_engine(_, plan: bytes) -> Any:  # noqa: N805
                self.loaded.append(plan)
                if engine is None:
                    _.logger.log(Logger.ERROR, "magic tag does not match")
                return engine

        super().__init__(
            ILogger=Logger,
            Runtime=Runtime,
            LayerInformationFormat=SimpleNamespace(JSON="json"),
            __name__="tensorrt",
            __version__="11.4.0",
            loaded=self.loaded,
            formats=self.formats,
        )


def test_an_engine_is_loaded_and_asked(tmp_path: Path) -> None:
    (tmp_path / "e.plan").write_bytes(b"plan")
    asked: list[str] = []

    def describe(form: str) -> str:
        asked.append(form)
        return document(*decoder())

    engine = SimpleNamespace(create_engine_inspector=lambda: SimpleNamespace(get_engine_information=describe))
    trt = Bindings(engine)
    reading = inspect_engine(trt, tmp_path / "e.plan")
    assert (trt.loaded, asked) == ([b"plan"], ["json"])
    assert reading.evidence.compiler == "tensorrt 11.4.0"
    assert reading.found[Q] == ("int8",)


def test_an_engine_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    (tmp_path / "e.plan").write_bytes(b"plan")
    with pytest.raises(EngineError, match=r"e\.plan: cannot be loaded here: magic tag does not match"):
        inspect_engine(Bindings(None), tmp_path / "e.plan")
    with pytest.raises(EngineError, match="cannot read the plan"):
        inspect_engine(Bindings(None), tmp_path / "missing.plan")


CLASSES = {"runtime": "Runtime", "engine": "ICudaEngine", "inspector": "EngineInspector", "trt": ""}
"""Variable in `inspect_engine` → the class of the bindings it holds; the module itself for `trt`."""


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_every_name_used_exists_in_the_real_bindings(backend: Backend) -> None:
    if importlib.util.find_spec(backend.module) is None:
        pytest.skip(f"{backend.title} is not installed: {backend.install}")
    trt = importlib.import_module(backend.module)
    used = set()
    for node in ast.walk(ast.parse(inspect.getsource(engine_inspector))):
        names: list[str] = []
        current: ast.AST = node
        while isinstance(current, ast.Attribute):
            names.insert(0, current.attr)
            current = current.value
        if names and isinstance(current, ast.Name) and current.id in CLASSES:
            used.add((current.id, *names))
    assert {("runtime", "deserialize_cuda_engine"), ("trt", "LayerInformationFormat", "JSON")} <= used
    for variable, *names in used:
        found = getattr(trt, CLASSES[variable]) if CLASSES[variable] else trt
        for name in names:
            assert hasattr(found, name), f"{backend.module}: {variable}.{'.'.join(names)}"
            found = getattr(found, name)
    # What the calls take and give, as the bindings document it.
    assert "serialized_engine" in trt.Runtime.deserialize_cuda_engine.__doc__
    assert "format" in trt.EngineInspector.get_engine_information.__doc__
    assert "-> str" in trt.EngineInspector.get_engine_information.__doc__
