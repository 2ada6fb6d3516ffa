"""A plan that was built without its weights gets them back from the bundle, once it is on the GPU."""

from pathlib import Path
from typing import Any

from spike_export.artifacts.errors import EngineError
from spike_export.artifacts.manifest import GRAPH_FILE
from spike_export.engines.plan.backend import BACKENDS
from spike_export.engines.plan.graph import load_graph, resize_cache, serialize_for_tensorrt
from spike_export.engines.plan.sidecar import PlanSidecar
from spike_export.engines.tensorrt.refusal import describe_refusal


def put_weights_back(trt: Any, engine: Any, logger: Any, bundle: Path, sidecar: PlanSidecar) -> bool:
    """Give an engine the weights that `strip_weights` left out of its plan, before it is run.

    Args:
        trt: The bindings.
        engine: The `trt.ICudaEngine`, deserialized from the plan.
        logger: A `trt.ILogger`.
        bundle: What the plan was built from.
        sidecar: Of the plan.

    Returns:
        Whether anything was missing.

    Raises:
        EngineError: The bundle is incomplete, or TensorRT does not take its weights; with the reason.
    """
    key = sidecar.key
    if key is None or not key.strip_weights:
        return False
    path, title = bundle / GRAPH_FILE, BACKENDS[sidecar.backend.name].title
    graph = load_graph(path)
    if key.capacity is not None:
        resize_cache(graph, sidecar.prefix + key.capacity)
    refitter = trt.Refitter(engine, logger)
    source = trt.OnnxParserRefitter(refitter, logger)
    if not source.refit_from_bytes(serialize_for_tensorrt(graph), str(path)):
        raise EngineError(f"{path}: {title}, putting weights back, {describe_refusal(source)}")
    if not refitter.refit_cuda_engine():
        missing = ", ".join(refitter.get_missing_weights()[:3]) or "it does not say which"
        raise EngineError(f"{path}: {title} lacks weights ({missing}); build the plan again, without --strip-weights")
    return True
