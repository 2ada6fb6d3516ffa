"""A GPU and a TensorRT that only pretend: the runtime's own code runs, and ONNX Runtime computes what a plan would.

The engine sees nothing but what a real one would: shapes, addresses and the order of calls. It reads and writes raw
memory at these addresses, and fails where TensorRT would fail or be undefined.
"""

import ctypes
import json
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from spike_export.artifacts.manifest import GRAPH_FILE, Manifest, load_manifest
from spike_export.engines.generation.decoding import Decoding
from spike_export.engines.generation.options import GenerationOptions
from spike_export.engines.onnx_runtime.denormals import denormals_flushed
from spike_export.engines.onnx_runtime.session import open_bundle
from spike_export.engines.plan.backend import BackendName
from spike_export.engines.plan.build_options import BatchRange, BuildOptions, ProfileName
from spike_export.engines.plan.build_profiles import Profile, make_profiles, resolve_limits
from spike_export.engines.plan.bundle_ropes import rope_by_length
from spike_export.engines.plan.graph import graph_inputs, load_graph
from spike_export.engines.plan.safety import CheckedPlan
from spike_export.engines.plan.sidecar import (
    Audit,
    BackendVersion,
    InputShapes,
    PlanFile,
    PlanSidecar,
    ProfileShapes,
)
from spike_export.engines.tensorrt import engines as trt_engines
from spike_export.engines.tensorrt.device import ALIGNMENT
from spike_export.engines.tensorrt.sampling import Drawn

SCRATCH_BYTES = {"prefill": 3000, "decode": 1000}
STREAM = 77
GIB = 1 << 30

CAPACITY = 24
"""Tokens: of the static caches, and of the plans' context."""

PROMPTS = [np.array(tokens) for tokens in ([3, 8, 21, 40, 2], [17], [60, 61, 62], [7, 7, 9])]

RTX_ONLY = frozenset({"CudaGraphStrategy", "DynamicShapesKernelSpecializationStrategy", "IRuntimeCache"})
"""Names that TensorRT's bindings lack."""


class DeviceFaultError(AssertionError):
    """The runtime did what a GPU or TensorRT does not survive."""


@dataclass
class SimulatedFetch:
    device: "SimulatedDevice"
    values: list[NDArray[Any]]

    def wait(self) -> list[NDArray[Any]]:
        if self.device.queueing:
            raise DeviceFaultError("the host waits in the middle of queueing")
        self.device.log.append("wait")
        return self.values


@dataclass
class SimulatedDevice:
    """Memory of the host; `log` holds what happened in order."""

    budget: int = 1 * GIB
    log: list[str] = field(default_factory=list)
    queueing: bool = False
    captured: list[Callable[[], None]] | None = None
    fragmented: bool = False
    _given: list[tuple["weakref.ref[torch.Tensor]", int]] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def stream(self) -> int:
        return STREAM

    def free_bytes(self) -> int:
        return self.budget - sum(size for tensor, size in self._given if tensor() is not None)

    def allocate(self, size: int) -> torch.Tensor:
        if self.fragmented or size > self.free_bytes():
            raise torch.OutOfMemoryError("CUDA out of memory")
        storage = torch.full((size + ALIGNMENT,), 0xFF, dtype=torch.uint8)  # NaN in every floating-point type
        start = -storage.data_ptr() % ALIGNMENT
        tensor = storage[start : start + size]
        self._given.append((weakref.ref(tensor), size))
        return tensor

    def require_allocated(self, address: int, size: int, name: str) -> None:
        for reference, given in self._given:
            tensor = reference()
            if tensor is not None and tensor.data_ptr() <= address and address + size <= tensor.data_ptr() + given:
                return
        raise DeviceFaultError(f"{name} lies outside the memory that is allocated")

    @contextmanager
    def queue(self) -> Iterator[None]:
        before, self.queueing = self.queueing, True
        try:
            with pytest.MonkeyPatch.context() as patch:
                for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"):
                    patch.setattr(torch.Tensor, name, _refuse(name))
                yield
        finally:
            self.queueing = before

    def upload(self, values: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(np.array(values))

    def fetch(self, tensors: Sequence[torch.Tensor]) -> SimulatedFetch:
        self.log.append("fetch")
        values = []
        for tensor in tensors:
            host = np.empty(tuple(tensor.shape), _numpy_type(tensor.dtype))
            dense = tensor.contiguous()
            ctypes.memmove(host.ctypes.data, dense.data_ptr(), host.nbytes)
            values.append(host)
        return SimulatedFetch(self, values)

    def finish(self) -> None:
        self.log.append("finish")

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        self.log.append("capture")
        self.captured = []
        enqueue()
        runs, self.captured = self.captured, None

        def replay() -> None:
            self.log.append("replay")
            for run in runs:
                run()

        return replay


def _refuse(name: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise DeviceFaultError(f"Tensor.{name} makes the host wait for the GPU")

    return refuse


def _numpy_type(dtype: torch.dtype) -> np.dtype[Any]:
    return np.dtype(str(dtype).removeprefix("torch.").replace("bool", "bool_"))


@dataclass
class SimulatedConfig:
    """`trt.IRuntimeConfig`."""

    strategy: Any = None
    cuda_graph_strategy: Any = None
    dynamic_shapes_kernel_specialization_strategy: Any = None
    cache: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> "SimulatedRuntimeCache":
        return SimulatedRuntimeCache()

    def set_runtime_cache(self, cache: "SimulatedRuntimeCache") -> bool:
        self.cache = cache
        return True


@dataclass
class SimulatedRuntimeCache:
    """`trt.IRuntimeCache`: its kernels are names of shapes."""

    kernels: set[str] = field(default_factory=set)

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(b"kernels"):
            return False
        self.kernels = set(json.loads(blob[7:]))
        return True

    def serialize(self) -> bytes:
        return b"kernels" + json.dumps(sorted(self.kernels)).encode()


class SimulatedEngine:
    """`trt.ICudaEngine` of a bundle; profiles as the builder makes them."""

    def __init__(self, trt: "SimulatedTrt", plan: Mapping[str, Any]) -> None:
        self.trt = trt
        bundle = Path(plan["bundle"])
        self.manifest: Manifest = load_manifest(bundle)
        self.session = open_bundle(bundle, threads=1).session
        self.profiles = trt.profiles[plan["name"]]
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = {value.name: value for value in self.session.get_outputs()}
        self.names = [*self.inputs, *self.outputs]
        self.num_io_tensors = len(self.names)
        self.num_optimization_profiles = len(self.profiles)
        self.streamable_weights_size = trt.streamable
        self.weight_streaming_budget_v2 = trt.streamable
        self.contexts: list[SimulatedContext] = []
        self.runs = 0
        if trt.backend == "tensorrt-rtx":
            self.create_runtime_config = SimulatedConfig

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> Any:
        return self.trt.TensorIOMode.INPUT if name in self.inputs else self.trt.TensorIOMode.OUTPUT

    def get_tensor_location(self, name: str) -> Any:
        return self.trt.TensorLocation.DEVICE

    def get_tensor_dtype(self, name: str) -> Any:
        kinds = {"float": "FLOAT", "float16": "HALF", "int64": "INT64", "bool": "BOOL"}
        return getattr(self.trt.DataType, kinds[self._value(name).type[7:-1]])

    def get_tensor_shape(self, name: str) -> Any:
        return self.trt.Dims([size if isinstance(size, int) else -1 for size in self._value(name).shape])

    def get_aliased_input_tensor(self, name: str) -> str | None:
        static = self.manifest.kv_cache == "static" and self.trt.aliases
        return name.replace("present.", "past_key_values.") if static and name.startswith("present.") else None

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return SCRATCH_BYTES[self.profiles[profile].name]

    def get_weight_streaming_automatic_budget(self) -> int:
        return self.streamable_weights_size // 2

    def create_execution_context(self, how: Any) -> "SimulatedContext":
        strategy = how.strategy if isinstance(how, SimulatedConfig) else how
        if strategy != self.trt.ExecutionContextAllocationStrategy.USER_MANAGED:
            raise DeviceFaultError("contexts would each have scratch memory of their own")
        context = SimulatedContext(self, how if isinstance(how, SimulatedConfig) else None)
        self.contexts.append(context)
        return context

    def _value(self, name: str) -> Any:
        return self.inputs.get(name) or self.outputs[name]


class SimulatedContext:
    """`trt.IExecutionContext`."""

    def __init__(self, engine: SimulatedEngine, config: SimulatedConfig | None) -> None:
        self.engine, self.config = engine, config
        self.trt, self.device = engine.trt, engine.trt.device
        self.profile: Profile | None = None
        self.memory: tuple[int, int] | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream == STREAM
        self.profile, self.memory, self.shapes = self.engine.profiles[index], None, {}
        return True

    def set_device_memory(self, address: int, size: int) -> None:
        assert self.profile is not None, "the profile decides how much is needed"
        if address % ALIGNMENT or size < SCRATCH_BYTES[self.profile.name]:
            raise DeviceFaultError("scratch memory is too small or not aligned")
        self.memory = (address, size)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None
        allowed = self.profile.shapes[name]
        if len(shape) != len(allowed.smallest) or not all(
            low <= size <= high for low, size, high in zip(allowed.smallest, shape, allowed.largest, strict=True)
        ):
            self.trt.complain(f"{name}: {list(shape)} is outside {allowed}")
            return False
        self.shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> Any:
        assert set(self.shapes) == set(self.engine.inputs), "shapes are known once all inputs have one"
        rows, columns = self.shapes["input_ids"]
        assert name == "logits"
        given = 1 if self.engine.manifest.logits == "last" else columns
        return self.trt.Dims([rows, given, self.engine.manifest.vocab_size])

    def set_tensor_address(self, name: str, address: int) -> bool:
        if not address or address % ALIGNMENT:
            raise DeviceFaultError(f"the address of {name} is {address}")
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == STREAM
        assert self.device.queueing, "work is queued in the device's queue() only"
        if self.trt.failing:
            self.trt.complain("enqueue failed")
            return False
        if self.memory is None:
            raise DeviceFaultError("no scratch memory")
        if missing := (set(self.engine.names) - set(self.addresses)) | (set(self.engine.inputs) - set(self.shapes)):
            raise DeviceFaultError(f"not set: {missing}")
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        if self.device.captured is None:
            self._run(shapes, addresses)
            return True

        def again() -> None:
            if (shapes, addresses) != (self.shapes, self.addresses):
                raise DeviceFaultError("a graph is launched whose context has changed")
            self._run(shapes, addresses)

        self.device.captured.append(again)
        return True

    def _run(self, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> None:
        assert self.profile is not None
        self.device.log.append(self.profile.name)
        self.engine.runs += 1
        self.trt.runs.append((self.profile.name, shapes["input_ids"]))
        if self.config is not None:
            self.config.cache.kernels.add(f"{self.profile.name}{shapes['input_ids']}")
        feeds = {name: self._read(name, addresses[name], shapes[name]) for name in self.engine.inputs}
        with denormals_flushed():
            values = self.engine.session.run(None, feeds)
        if self.trt.overflowing:
            values = [np.full_like(value, np.nan) for value in values]
        for name, value in zip(self.engine.outputs, values, strict=True):
            past = self.engine.get_aliased_input_tensor(name)
            if past is not None and addresses[name] != addresses[past]:
                raise DeviceFaultError(f"{name} is aliased and bound elsewhere")
            if past is None and name != "logits" and addresses[name] in (addresses[n] for n in feeds):
                raise DeviceFaultError(f"{name} overwrites an input that is still read")
            dense = np.ascontiguousarray(value)
            self.device.require_allocated(addresses[name], dense.nbytes, name)
            ctypes.memmove(addresses[name], dense.ctypes.data, dense.nbytes)

    def _read(self, name: str, address: int, shape: tuple[int, ...]) -> NDArray[Any]:
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
        values = np.zeros(shape, kinds.get(self.engine.inputs[name].type, np.bool_))
        self.device.require_allocated(address, values.nbytes, name)
        ctypes.memmove(values.ctypes.data, address, values.nbytes)
        return values


@dataclass
class SimulatedTrt:
    """The bindings: enumerations and loggers are the real ones, runtime and engines pretend."""

    real: Any
    backend: BackendName
    device: SimulatedDevice
    profiles: dict[str, tuple[Profile, ...]] = field(default_factory=dict)
    aliases: bool = True
    streamable: int = 0
    weights: int = 0
    failing: bool = False
    overflowing: bool = False
    runs: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    engines: list[SimulatedEngine] = field(default_factory=list)
    logger: Any = None

    def __getattr__(self, name: str) -> Any:
        if self.backend == "tensorrt" and name in RTX_ONLY:
            raise AttributeError(f"{self.backend} has no {name}")
        return getattr(self.real, name)

    def Runtime(self, logger: Any) -> "SimulatedTrt":  # noqa: N802  # the bindings' name
        self.logger = logger
        return self

    def deserialize_cuda_engine(self, content: Any) -> SimulatedEngine | None:
        text = bytes(content)
        if not text.startswith(b"{"):
            self.complain("Serialization assertion failed")
            return None
        if self.device.free_bytes() < self.weights:
            self.complain("Requested amount of GPU memory could not be allocated")
            return None
        engine = SimulatedEngine(self, json.loads(text))
        self.engines.append(engine)
        return engine

    def complain(self, message: str) -> None:
        self.logger.log(self.ILogger.ERROR, message)


@dataclass
class Simulation:
    """Plans of bundles that the runtime can load on any machine."""

    trt: SimulatedTrt
    device: SimulatedDevice
    folder: Path

    def plan(
        self, bundle: Path, *names: ProfileName, batch: int = 4, context: int = CAPACITY, prompt: int = 16
    ) -> CheckedPlan:
        """Pretend to have built a plan."""
        manifest = load_manifest(bundle)
        options = BuildOptions(
            profiles=names, batch=BatchRange(1, 1, batch), max_context=context, max_prompt=prompt, typical_prompt=4
        )
        limits = resolve_limits(
            options, manifest.cached_prefix_length, manifest.max_position_embeddings, manifest.capacity
        )
        profiles = make_profiles(graph_inputs(load_graph(bundle / GRAPH_FILE)), names, limits)
        path = self.folder / f"{'-'.join(names)}.plan"
        path.write_text(json.dumps({"bundle": str(bundle), "name": path.stem}))
        self.trt.profiles[path.stem] = profiles
        written = sidecar(self.trt.backend, profiles, limits.prefix, limits.context)
        return CheckedPlan(path, written.model_copy(update={"rope_by_length": rope_by_length(bundle)}))


def sidecar(backend: BackendName, profiles: Sequence[Profile], prefix: int, context: int) -> PlanSidecar:
    return PlanSidecar(
        backend=BackendVersion(name=backend, version="0", reason="test"),
        targets=("SM86",),
        profiles=tuple(
            ProfileShapes(
                name=profile.name,
                inputs={
                    name: InputShapes(min=shapes.smallest, opt=shapes.typical, max=shapes.largest)
                    for name, shapes in profile.shapes.items()
                },
            )
            for profile in profiles
        ),
        prefix=prefix,
        max_context=context,
        bundle_sha256="0",
        plan=PlanFile(sha256="0", size=1),
        build_seconds=1.0,
        peak_memory=1,
        audit=Audit(readable=False, int8_products=0, other_products=0, modules={}),
    )


def simulate(
    monkeypatch: pytest.MonkeyPatch, folder: Path, backend: BackendName = "tensorrt", **device: Any
) -> Simulation:
    """Let the runtime load a pretended TensorRT for the rest of the test."""
    real = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'spike-export[rtx]'")
    simulated = SimulatedDevice(**device)
    trt = SimulatedTrt(real, backend, simulated)
    monkeypatch.setattr(trt_engines, "_bindings", lambda _: trt)
    return Simulation(trt, simulated, folder)


class Greedy:
    """The most probable token; its log-probability and the two best where asked for."""

    def __init__(self, options: GenerationOptions, rows: int, device: torch.device) -> None:
        self.options = options

    def draw(self, logits: torch.Tensor, seen: torch.Tensor | None) -> Drawn:
        assert logits.dtype == torch.float32
        if seen is not None:
            logits = logits.masked_fill(seen, -torch.inf)
        tokens = logits.argmax(dim=-1)
        if seen is not None:
            seen.scatter_(1, tokens[:, None], True)
        if self.options.logprobs is None:
            return Drawn(tokens)
        best = logits.log_softmax(dim=-1).topk(2, dim=-1)
        return Drawn(tokens, best.values[:, 0], best.indices, best.values)


def decoded(runtime: Decoding, prompts: Sequence[NDArray[np.int64]], count: int) -> list[list[int]]:
    """Tokens per row."""
    steps = list(runtime.decode(prompts, GenerationOptions(max_new_tokens=count)))
    assert len(steps) == count
    rows: list[list[int]] = np.stack([step.tokens for step in steps], axis=1).tolist()
    return rows
