"""Drives TensorRT or TensorRT-RTX: graph in, serialized plan out. Runs inside the build process."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from spike_export.artifacts.errors import EngineError
from spike_export.artifacts.files.atomic_write import atomic_path
from spike_export.artifacts.files.documents import require_file
from spike_export.engines.build.callbacks import PlanStream, make_monitor, make_writer
from spike_export.engines.plan.backend import Backend, PlanFeature
from spike_export.engines.plan.build_options import HardwareCompatibility
from spike_export.engines.plan.build_profiles import Profile
from spike_export.engines.plan.graph import serialize_for_tensorrt
from spike_export.engines.tensorrt.log import BuildLog, make_logger
from spike_export.engines.tensorrt.refusal import describe_refusal, shorten

FLAGS: Mapping[PlanFeature, str] = {
    "refit": "REFIT",
    "strip_weights": "STRIP_PLAN",
    "weight_streaming": "WEIGHT_STREAMING",
    "version_compatible": "VERSION_COMPATIBLE",
}
"""Feature → member of `trt.BuilderFlag`."""

IDENTICAL_REFIT = "REFIT_IDENTICAL"
"""The flag by which stripped weights can be put back, where other weights need not be possible."""

HARDWARE_LEVELS: Mapping[HardwareCompatibility, str] = {
    "ampere-plus": "AMPERE_PLUS",
    "same-compute-capability": "SAME_COMPUTE_CAPABILITY",
}
"""Hardware compatibility → member of `trt.HardwareCompatibilityLevel`."""


class BuildCancelledError(Exception):
    """The build stopped because it was asked to."""


@dataclass(frozen=True)
class CompileSettings:
    """All but the graph.

    Attributes:
        targets: Members of `trt.ComputeCapability`; empty where the backend takes the GPU at hand.
        optimization_level: 0 to 5.
        features: Those of `FLAGS`; others have settings of their own.
        timing_cache: File to read when present and to write, or None.
    """

    backend: Backend
    targets: tuple[str, ...]
    profiles: tuple[Profile, ...]
    optimization_level: int
    features: frozenset[PlanFeature] = frozenset()
    hardware_compatible: HardwareCompatibility | None = None
    timing_cache: Path | None = None


@dataclass(frozen=True)
class Watch:
    """How a build reports (percent, 0 to 100) and how it learns that it is to stop."""

    report: Callable[[int], None]
    cancelled: Callable[[], bool]


def compile_plan(
    trt: Any, graph_path: Path, graph: onnx.ModelProto, settings: CompileSettings, stream: PlanStream, watch: Watch
) -> BuildLog:
    """Build a plan and write it to `stream`.

    Args:
        trt: The bindings.
        graph_path: Where `graph` was read from; its weights are found beside it.
        graph: The graph without its weights; not changed.

    Returns:
        What TensorRT said.

    Raises:
        EngineError: TensorRT refused a node, a profile or the whole network; with its reason.
        BuildCancelledError: `watch.cancelled` said so.
        ArtifactError: The timing cache could not be written.
        OSError: The stream could not be written.
    """
    log = BuildLog()
    logger = make_logger(trt, log)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    _parse(parser, graph_path, graph)
    config = builder.create_builder_config()
    # Else the engine inspector, which proves the precisions of TensorRT's plans, tells names only.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    _apply_targets(trt, config, settings.targets)
    config.builder_optimization_level = settings.optimization_level
    apply_features(trt, config, settings)
    for profile in settings.profiles:
        _add_profile(builder, config, profile, log)
    cache = attach_timing_cache(config, settings)
    monitor = make_monitor(trt, watch.report, watch.cancelled)
    config.progress_monitor = monitor
    built = _serialize(trt, builder, network, config, stream)
    if stream.failure is not None:
        raise stream.failure
    if watch.cancelled():
        raise BuildCancelledError
    if not built:
        raise EngineError(f"{settings.backend.title} cannot build the plan: {_first_reason(log.errors)}")
    if cache is not None and settings.timing_cache is not None:
        save_timing_cache(cache, settings.timing_cache)
    return log


def _parse(parser: Any, path: Path, graph: onnx.ModelProto) -> None:
    # Given with its path so that the weights, which may exceed protobuf's 2 GiB, are read from their file.
    if not parser.parse(serialize_for_tensorrt(graph), str(path)):
        raise EngineError(f"{path}: TensorRT {describe_refusal(parser)}")


def _apply_targets(trt: Any, config: Any, targets: Sequence[str]) -> None:
    if not targets:
        return
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        if not config.set_compute_capability(getattr(trt.ComputeCapability, target), index):
            raise EngineError(f"this version of TensorRT-RTX refuses the target {target}; leave it out")


def apply_features(trt: Any, config: Any, settings: CompileSettings) -> None:
    """Set the flags and levels of a builder configuration for what the plan is to be able to do."""
    flags = [flag for feature, flag in FLAGS.items() if feature in settings.features]
    if "strip_weights" in settings.features and "refit" not in settings.features:
        flags.append(IDENTICAL_REFIT)
    for flag in flags:
        config.set_flag(getattr(trt.BuilderFlag, flag))
    if settings.hardware_compatible is not None:
        level = HARDWARE_LEVELS[settings.hardware_compatible]
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)


def _add_profile(builder: Any, config: Any, profile: Profile, log: BuildLog) -> None:
    made = builder.create_optimization_profile()
    for name, shapes in profile.shapes.items():
        made.set_shape(name, shapes.smallest, shapes.typical, shapes.largest)
    if config.add_optimization_profile(made) < 0:
        raise EngineError(f"TensorRT refuses the {profile.name} profile: {_first_reason(log.errors)}")


def attach_timing_cache(config: Any, settings: CompileSettings) -> Any:
    """Give the build its timing cache, read from the file when there is one; return it, or None without.

    Raises:
        EngineError: The file is there and cannot be read.
    """
    if settings.timing_cache is None:
        return None
    try:
        require_file(settings.timing_cache)
        stored = settings.timing_cache.read_bytes()
    except FileNotFoundError:
        stored = b""
    except OSError as error:
        raise EngineError(f"{settings.timing_cache}: cannot read the timing cache: {error.strerror}") from error
    cache = config.create_timing_cache(stored)
    # A cache of another GPU or version is not an error: it is replaced.
    if not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def save_timing_cache(cache: Any, path: Path) -> None:
    """Write a build's timing cache, which builds that run at the same time may keep in the same file.

    Raises:
        ArtifactError: The file cannot be written.
    """
    with atomic_path(path, shared=True) as partial:
        partial.write_bytes(memoryview(cache.serialize()))


def _serialize(trt: Any, builder: Any, network: Any, config: Any, stream: PlanStream) -> bool:
    """Build; through a stream where the version can, which saves a second copy of the plan in memory."""
    if hasattr(builder, "build_serialized_network_to_stream"):
        writer = make_writer(trt, stream)
        return bool(builder.build_serialized_network_to_stream(network, config, writer))
    plan = builder.build_serialized_network(network, config)
    return plan is not None and stream.write(bytes(memoryview(plan))) > 0


def _first_reason(errors: Sequence[str]) -> str:
    # On a machine without a GPU each failure is followed by one about the missing driver, which is not its cause.
    return shorten(errors[0]) if errors else "it gives no reason"
