"""Weights go back into a plan that was built without them; with objects in place of those that need a GPU."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from spike_export.artifacts.errors import EngineError
from spike_export.engines.plan.sidecar import Audit, BackendVersion, PlanFile, PlanKey, PlanSidecar
from spike_export.engines.tensorrt.refit import put_weights_back
from tests.support.tiny.bundles import write_bundle

LOGGER, ENGINE = object(), object()


def sidecar(stripped: bool) -> PlanSidecar:
    key = PlanKey(
        tool="0",
        bundle="aa",
        backend="tensorrt",
        version="11.4.0.106",
        targets=("SM90",),
        device="NVIDIA H200",
        profiles=("decode",),
        split=False,
        batch=(1, 1, 1),
        context=64,
        typical_prompt=64,
        max_prompt=64,
        capacity=None,
        optimization_level=3,
        refit=False,
        strip_weights=stripped,
        weight_streaming=False,
        hardware_compatible=None,
        version_compatible=False,
    )
    return PlanSidecar(
        backend=BackendVersion(name="tensorrt", version="11.4.0.106", reason="test"),
        targets=("SM90",),
        profiles=(),
        prefix=3,
        max_context=64,
        bundle_sha256="aa",
        plan=PlanFile(sha256="bb", size=1),
        build_seconds=1.0,
        peak_memory=1,
        key=key,
        audit=Audit(readable=False, int8_products=0, other_products=0, modules={}),
    )


class FakeBindings:
    """As much of the bindings as refitting uses; keeps the graph it is given."""

    def __init__(self, parses: bool = True, refits: bool = True, faults: int = 0) -> None:
        self.parses, self.refits, self.faults = parses, refits, faults
        self.given: tuple[bytes, str] | None = None

    def Refitter(self, engine: object, logger: object) -> Any:  # noqa: N802  # as TensorRT names it
        assert (engine, logger) == (ENGINE, LOGGER)
        return SimpleNamespace(refit_cuda_engine=lambda: self.refits, get_missing_weights=lambda: ["w.a", "w.b"])

    def OnnxParserRefitter(self, refitter: object, logger: object) -> Any:  # noqa: N802
        def refit_from_bytes(model: bytes, path: str) -> bool:
            self.given = (model, path)
            return self.parses

        fault = SimpleNamespace(node_name=lambda: "n", node_operator=lambda: "MatMul", desc=lambda: "no such weight")
        return SimpleNamespace(refit_from_bytes=refit_from_bytes, num_errors=self.faults, get_error=lambda index: fault)


def test_a_whole_plan_needs_nothing(tmp_path: Path) -> None:
    assert put_weights_back(FakeBindings(), ENGINE, LOGGER, tmp_path / "none", sidecar(stripped=False)) is False


def test_the_engine_gets_the_weights_of_the_graph_it_was_built_from(tmp_path: Path) -> None:
    bundle, trt = write_bundle(tmp_path / "bundle"), FakeBindings()
    assert put_weights_back(trt, ENGINE, LOGGER, bundle, sidecar(stripped=True))
    assert trt.given is not None
    assert trt.given[1] == str(bundle / "model.onnx")
    graph = onnx.load_model_from_string(trt.given[0]).graph
    assert {tensor.name for tensor in graph.initializer} >= {"lm_head.weight", "model.embed_tokens.weight"}
    attention = next(node for node in graph.node if node.op_type == "Attention")
    assert "TRT_decomposable" in {attribute.name for attribute in attention.attribute}


@pytest.mark.parametrize(
    ("trt", "message"),
    [
        (FakeBindings(parses=False, faults=2), r"refuses node 'n' \(MatMul\): no such weight \(and 1 more\)"),
        (FakeBindings(parses=False), "gives no reason"),
        (FakeBindings(refits=False), r"TensorRT lacks weights \(w\.a, w\.b\); build the plan again, without"),
    ],
)
def test_a_refusal_is_told(tmp_path: Path, trt: FakeBindings, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        put_weights_back(trt, ENGINE, LOGGER, write_bundle(tmp_path / "bundle"), sidecar(stripped=True))


def test_a_bundle_without_weights_is_told(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    (bundle / "model.onnx.data").unlink()
    with pytest.raises(EngineError, match=r"model\.onnx\.data is missing"):
        put_weights_back(FakeBindings(), ENGINE, LOGGER, bundle, sidecar(stripped=True))
