"""Plan files loaded: engines on the GPU, and execution contexts that share one scratch memory."""

import importlib
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spike_export.artifacts.errors import EngineError
from spike_export.engines.plan.backend import BACKENDS, Backend
from spike_export.engines.plan.build_options import ProfileName
from spike_export.engines.plan.safety import CheckedPlan
from spike_export.engines.plan.validity import require_valid_header
from spike_export.engines.tensorrt.buffers import Buffers
from spike_export.engines.tensorrt.device import Device
from spike_export.engines.tensorrt.log import BuildLog, make_logger
from spike_export.engines.tensorrt.plan_io import PlanIo, read_plan_io
from spike_export.engines.tensorrt.refit import put_weights_back
from spike_export.engines.tensorrt.runtime_cache import RuntimeCache, runtime_cache_path
from spike_export.engines.tensorrt.station import Station

Specialization = Literal["EAGER", "LAZY", "NONE"]

_COMPILES_AT_RUN = frozenset({"tensorrt-rtx"})

SCRATCH = "scratch memory"


@dataclass(frozen=True, slots=True)
class RuntimeOptions:
    """How plans are run.

    Attributes:
        gpu: Index of the GPU.
        cuda_graphs: Launch a decode step as one graph where its shapes stay (a static cache).
        runtime_cache: Keep what TensorRT-RTX compiles beside the plan.
        weight_budget: Bytes of weights that stay on the GPU while the rest is streamed, for plans built with weight
            streaming; `auto` for what TensorRT thinks fit, None to keep all.
        lag: Steps that the GPU is ahead of the tokens handed out.
    """

    gpu: int = 0
    cuda_graphs: bool = True
    runtime_cache: bool = True
    weight_budget: int | Literal["auto"] | None = None
    lag: int = 2

    def __post_init__(self) -> None:
        if isinstance(self.weight_budget, int) and self.weight_budget < 0:
            raise EngineError(f"weight_budget is {self.weight_budget}; expected 0 bytes or more")
        if self.lag < 0:
            raise EngineError(f"lag is {self.lag}; expected 0 steps or more")


def specialization(name: ProfileName, *, static: bool) -> Specialization:
    """Return when TensorRT-RTX compiles kernels for a shape that it meets.

    One static shape serves thousands of decode steps: at once. A prompt's length may come again: in the background.
    With a cache that grows, no step's shapes ever come again: never.
    """
    if name == "prefill":
        return "LAZY"
    return "EAGER" if static else "NONE"


class LoadedPlans:
    """The engines of one plan with both profiles, or of a prefill plan and a decode plan.

    Attributes:
        io: Inputs and outputs, the same for both.
    """

    def __init__(
        self,
        plans: Sequence[CheckedPlan],
        options: RuntimeOptions,
        device: Device,
        buffers: Buffers,
        bundle: Path | None = None,
    ) -> None:
        """Load them; plans without weights get them from the bundle.

        Raises:
            EngineError: The backend is missing, or TensorRT refuses a plan; with its reason.
        """
        self.backend: Backend = BACKENDS[plans[0].sidecar.backend.name]
        self._options, self._device, self._buffers, self._bundle = options, device, buffers, bundle
        self._trt = _bindings(self.backend)
        self._log = BuildLog()
        # Engines and contexts hold on to these without a reference that Python knows of.
        self._logger = make_logger(self._trt, self._log)
        self._runtime = self._trt.Runtime(self._logger)
        self._engines: list[Any] = []
        self._places: dict[ProfileName, tuple[int, int]] = {}
        self._caches: dict[int, RuntimeCache] = {}
        self._plans = tuple(plans)
        for plan in plans:
            for index, profile in enumerate(plan.sidecar.profiles):
                self._places[profile.name] = (len(self._engines), index)
            with device.queue():
                self._engines.append(self._load(plan))
        ios = [
            read_plan_io(self._trt, engine, str(plan.path)) for engine, plan in zip(self._engines, plans, strict=True)
        ]
        if any(io != ios[0] for io in ios):
            raise EngineError("the prefill plan and the decode plan differ in inputs or outputs; build both again")
        self.io: PlanIo = ios[0]
        self._scratch = max(
            int(self._engines[engine].get_device_memory_size_for_profile_v2(profile))
            for engine, profile in self._places.values()
        )
        with device.queue():  # memory belongs to the stream on which it is first used
            buffers.reserve({SCRATCH: self._scratch})

    @property
    def compiles_at_run(self) -> bool:
        """Return whether the backend compiles kernels while it runs, and so has settings for that and a cache.

        Such a one also makes its own CUDA graphs: it swaps kernels, which a graph of ours would not notice.
        """
        return self.backend.name in _COMPILES_AT_RUN

    def station(self, name: ProfileName) -> Station:
        """Return a new execution context of a profile. All share the scratch memory: they run one after another.

        Raises:
            EngineError: TensorRT cannot make one.
        """
        index, profile = self._places[name]
        self._log.errors.clear()
        with self._device.queue():
            context = self._context(index, name)
        if context is None:
            raise EngineError(f"{self.backend.title} makes no execution context: {self._log.reason}")
        station = Station(self.backend, context, profile, self._device, self._log)
        station.use_scratch(self._buffers.address(SCRATCH), self._scratch)
        return station

    def keep_kernels(self) -> None:
        """Write what was compiled beside the plans; cheap when nothing was."""
        with self._device.queue():
            for cache in self._caches.values():
                cache.save()

    def release(self) -> None:
        """Let go of the engines, which runtime and logger must outlive; no context is left of them by now."""
        self._caches.clear()
        self._engines.clear()

    def _load(self, plan: CheckedPlan) -> Any:
        key = plan.sidecar.key
        if key is not None and key.version_compatible:
            # Such a plan brings the code of the runtime that it runs in.
            self._runtime.engine_host_code_allowed = True
        self._log.errors.clear()
        try:
            require_valid_header(self._trt, self._runtime, plan.path)
            with plan.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                # Mapped, so that a plan of gigabytes is not in memory once more.
                engine = self._runtime.deserialize_cuda_engine(content)
        except (OSError, ValueError) as error:
            raise EngineError(f"{plan.path}: cannot read the plan ({error}); build it again") from error
        if engine is None:
            raise self._not_loaded(plan)
        has, says = int(engine.num_optimization_profiles), len(plan.sidecar.profiles)
        if has != says:
            raise EngineError(f"{plan.path} has {has} profiles and its sidecar names {says}; build it again")
        if self._bundle is not None:
            put_weights_back(self._trt, engine, self._logger, self._bundle, plan.sidecar)
        self._stream_weights(engine, plan)
        return engine

    def _not_loaded(self, plan: CheckedPlan) -> EngineError:
        size, free, reason = plan.sidecar.plan.size, self._device.free_bytes(), self._log.reason
        remedy = ""
        if size > free or "memory" in reason.lower():
            remedy = "; free memory on the GPU, or build with --weight-streaming and give a weight budget"
        return EngineError(
            f"{plan.path}: {self.backend.title} cannot load the plan of {size} bytes with {free} bytes free on the "
            f"GPU: {reason}{remedy}"
        )

    def _stream_weights(self, engine: Any, plan: CheckedPlan) -> None:
        """Set the budget; before any context, whose scratch memory depends on it."""
        budget = self._options.weight_budget
        if budget is None:
            return
        streamable = int(engine.streamable_weights_size)
        if not streamable:
            raise EngineError(
                f"{plan.path}: a weight budget was given and the plan's weights cannot be streamed; build it with "
                "--weight-streaming, or leave the budget out"
            )
        if budget == "auto":
            budget = int(engine.get_weight_streaming_automatic_budget())
        engine.weight_streaming_budget_v2 = min(budget, streamable)

    def _context(self, index: int, name: ProfileName) -> Any:
        engine, strategy = self._engines[index], self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self.compiles_at_run:
            return engine.create_execution_context(strategy)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        when = specialization(name, static=self.io.static)
        config.dynamic_shapes_kernel_specialization_strategy = getattr(
            self._trt.DynamicShapesKernelSpecializationStrategy, when
        )
        graphs = self._options.cuda_graphs and name == "decode" and self.io.static
        strategies = self._trt.CudaGraphStrategy
        config.cuda_graph_strategy = strategies.WHOLE_GRAPH_CAPTURE if graphs else strategies.DISABLED
        if index not in self._caches:
            path = runtime_cache_path(self._plans[index].path) if self._options.runtime_cache else None
            self._caches[index] = RuntimeCache.open(config, path)
        config.set_runtime_cache(self._caches[index].handle)
        return engine.create_execution_context(config)


def _bindings(backend: Backend) -> Any:
    try:
        return importlib.import_module(backend.module)
    except (ImportError, OSError) as error:
        raise EngineError(f"{backend.title} cannot be loaded ({error}); run: {backend.install}") from error
