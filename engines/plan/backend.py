"""The two compilers that share one Python API: TensorRT (needs a GPU) and TensorRT-RTX (builds on a CPU)."""

import ctypes
import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from spike_export.artifacts.errors import EngineError

BackendName = Literal["tensorrt", "tensorrt-rtx"]
BackendChoice = Literal["auto", "tensorrt", "tensorrt-rtx"]
PlanFeature = Literal[
    "refit", "strip_weights", "weight_streaming", "hardware_compatible", "version_compatible", "timing_cache"
]
"""What a build can be asked for beyond shapes and targets; the fields of `BuildOptions` have these names."""


@dataclass(frozen=True, slots=True)
class Backend:
    """What differs between the compilers; all else is one code.

    Attributes:
        title: Its name in messages.
        module: Python module that holds the bindings.
        install: Command that installs it.
        packages: Distributions of which one holds the bindings; its version is theirs.
        needs_gpu: It compiles for the GPU at hand, and only there.
        targets: Compute capabilities a plan can be built for; empty where the GPU at hand decides.
        default_targets: What is built when none are asked for.
        lacking: What it cannot be asked for → why, and what to do instead.
        lacking_without_gpu: The same of what it can do only on a machine with a GPU.
    """

    name: BackendName
    title: str
    module: str
    install: str
    packages: tuple[str, ...]
    needs_gpu: bool
    targets: tuple[str, ...]
    default_targets: tuple[str, ...]
    lacking: Mapping[PlanFeature, str] = field(default_factory=dict)
    lacking_without_gpu: Mapping[PlanFeature, str] = field(default_factory=dict)


TENSORRT = Backend(
    name="tensorrt",
    title="TensorRT",
    module="tensorrt",
    install="pip install 'spike-export[tensorrt]'",
    packages=("tensorrt-cu13", "tensorrt-cu12", "tensorrt"),
    needs_gpu=True,
    targets=(),
    default_targets=(),
)

_REFIT_NEEDS_A_GPU = "it compiles weights that can be replaced on a GPU only; build on a machine with one"

TENSORRT_RTX = Backend(
    name="tensorrt-rtx",
    title="TensorRT-RTX",
    module="tensorrt_rtx",
    install="pip install 'spike-export[rtx]'",
    packages=("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
    needs_gpu=False,
    # The members of trt.ComputeCapability in 1.7, less NONE and CURRENT: Hopper is not among them.
    targets=("SM75", "SM80", "SM86", "SM89", "SM120", "SM121"),
    default_targets=("SM80", "SM86", "SM89", "SM120"),
    lacking={
        # It would also make TensorRT-RTX query a GPU.
        "timing_cache": "it builds without timing kernels and keeps no timing cache; leave it out",
        "hardware_compatible": "its plans run on every GPU they have a target for; give several --target instead",
        "version_compatible": "its plans run in the release that built them only; build one plan per release",
    },
    # docs/decisions/plan-building.md: not so in its manual, but so in 1.7.1, and for a single MatMul already.
    lacking_without_gpu={"refit": _REFIT_NEEDS_A_GPU, "strip_weights": _REFIT_NEEDS_A_GPU},
)

BACKENDS: Mapping[BackendName, Backend] = {backend.name: backend for backend in (TENSORRT, TENSORRT_RTX)}

TENSORRT_ONLY_TARGETS = ("SM90", "SM100", "SM103")
"""Data-centre GPUs that TensorRT compiles for and TensorRT-RTX cannot."""

FLOAT8_TARGETS = ("SM89", "SM90", "SM100", "SM103", "SM120", "SM121")
"""GPUs that multiply FP8; for older ones neither compiler takes a graph that holds any."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """The first NVIDIA GPU of the machine; `target` is its compute capability, e.g. `SM90`."""

    name: str
    target: str


@dataclass(frozen=True, slots=True)
class Machine:
    """What the choice of a backend depends on.

    Attributes:
        installed: Names of the backends whose bindings can be imported.
        gpu: None without an NVIDIA GPU (or without its driver).
        versions: Of the installed backends; what is missing here is asked of the installation.
    """

    installed: frozenset[BackendName]
    gpu: Gpu | None
    versions: Mapping[BackendName, str] = field(default_factory=dict)

    def version(self, name: BackendName) -> str | None:
        """Return a backend's version, such as `1.7.1.116`; None where it is not installed."""
        return self.versions.get(name) or installed_version(BACKENDS[name])


@dataclass(frozen=True, slots=True)
class ChosenBackend:
    """A backend, and one sentence that says why it was taken."""

    backend: Backend
    reason: str


def detect_machine(gpu: int = 0) -> Machine:
    """Look for the backends and for the GPU of that index, without importing or initialising either backend."""
    installed = frozenset(name for name, backend in BACKENDS.items() if importlib.util.find_spec(backend.module))
    return Machine(installed, find_gpu(gpu))


def installed_version(backend: Backend) -> str | None:
    """Return the version of a backend's bindings; None where they are not installed.

    The bindings are imported only where no package tells (installed as a system package, say).
    """
    for package in backend.packages:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    try:
        return str(importlib.import_module(backend.module).__version__)
    except (ImportError, OSError):
        return None


def require_features(backend: Backend, asked: frozenset[PlanFeature], gpu: Gpu | None) -> None:
    """Refuse what a backend cannot do.

    Raises:
        EngineError: Names the option, the reason, and what to do instead.
    """
    lacking = dict(backend.lacking)
    if gpu is None:
        lacking |= backend.lacking_without_gpu
    for feature, reason in lacking.items():
        if feature in asked:
            option = feature.replace("_", "-")
            raise EngineError(f"{backend.title} cannot build with --{option}: {reason}")


def find_gpu(index: int = 0) -> Gpu | None:
    """Return an NVIDIA GPU, asking the driver; None where there is no driver or no GPU of that index."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    # 75 and 76 are CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR; each call returns 0 on success.
    failed = (
        cuda.cuInit(0)
        or cuda.cuDeviceGet(ctypes.byref(device), index)
        or cuda.cuDeviceGetName(name, len(name), device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
    )
    return None if failed else Gpu(name.value.decode(errors="replace"), f"SM{major.value}{minor.value}")


def choose_backend(choice: BackendChoice, machine: Machine) -> ChosenBackend:
    """Return the backend to build with.

    `auto` is `tensorrt` where it is installed and a GPU is present, else `tensorrt-rtx`.

    Raises:
        EngineError: The wanted backend is not installed, or lacks the GPU it needs; the remedy is named.
    """
    if choice == "auto":
        return _choose_automatically(machine)
    backend = BACKENDS[choice]
    if backend.name not in machine.installed:
        raise EngineError(f"backend {choice} is not installed; run: {backend.install}")
    if backend.needs_gpu and machine.gpu is None:
        raise EngineError(
            f"backend {choice} compiles for the GPU of this machine and no NVIDIA GPU was found; build on the machine "
            f"that will run the plan, or take --backend tensorrt-rtx, which builds on a CPU"
        )
    return ChosenBackend(backend, "as asked for")


def _choose_automatically(machine: Machine) -> ChosenBackend:
    if "tensorrt" in machine.installed and machine.gpu is not None:
        return ChosenBackend(TENSORRT, f"TensorRT is installed and there is a GPU ({machine.gpu.name})")
    if "tensorrt-rtx" not in machine.installed:
        cause = "TensorRT is installed but there is no NVIDIA GPU" if machine.installed else "neither is installed"
        raise EngineError(
            f"no TensorRT backend can build here: {cause}; run: {TENSORRT_RTX.install} (builds on a CPU), or on a "
            f"machine with a GPU: {TENSORRT.install}"
        )
    if machine.gpu is None:
        return ChosenBackend(TENSORRT_RTX, "there is no NVIDIA GPU, and TensorRT-RTX builds on a CPU")
    reason = "TensorRT is not installed"
    if machine.gpu.target in TENSORRT_ONLY_TARGETS:
        reason += (
            f"; the plan will not run on this machine's {machine.gpu.name} ({machine.gpu.target}), "
            f"for that run: {TENSORRT.install}"
        )
    return ChosenBackend(TENSORRT_RTX, reason)


def resolve_targets(
    backend: Backend, asked: tuple[str, ...], gpu: Gpu | None, *, float8: bool = False
) -> tuple[str, ...]:
    """Return the compute capabilities to build for, e.g. `("SM80", "SM86")`, without duplicates.

    Args:
        asked: Names in any case; empty for the backend's default.
        gpu: Of this machine.
        float8: Whether the graph multiplies FP8; the default is then restricted to what can.

    Raises:
        EngineError: A target is unknown, the backend cannot be asked for it, or it has no FP8.
    """
    targets = _known_targets(backend, asked, gpu)
    if not float8:
        return targets
    lacking = [target for target in targets if target not in FLOAT8_TARGETS]
    if lacking and (asked or not backend.targets):
        raise EngineError(
            f"{lacking[0]} does not multiply FP8, and the bundle's linears are FP8; give a target from SM89 on, or "
            "export with --number-format int8"
        )
    return tuple(target for target in targets if target not in lacking)


def require_float8_compatibility(compatible: str | None, *, float8: bool) -> None:
    """Refuse a hardware compatibility that takes GPUs without FP8.

    Args:
        compatible: The level asked for; None for none.
        float8: Whether the graph multiplies FP8.

    Raises:
        EngineError: Names both options.
    """
    if float8 and compatible == "ampere-plus":
        raise EngineError(
            "--hardware-compatible ampere-plus takes GPUs that do not multiply FP8, and the bundle's linears are FP8; "
            "leave it out, or export with --number-format int8"
        )


def omission(backend: Backend, asked: tuple[str, ...]) -> str | None:
    """Return why some of the backend's default targets are left out for an FP8 graph; None where none are."""
    lacking = [target for target in backend.default_targets if target not in FLOAT8_TARGETS]
    return f"FP8 needs SM89 or later, so that {', '.join(lacking)} are left out" if lacking and not asked else None


def _known_targets(backend: Backend, asked: tuple[str, ...], gpu: Gpu | None) -> tuple[str, ...]:
    wanted = tuple(dict.fromkeys(target.upper() for target in asked))
    if not backend.targets:
        here = (gpu.target,) if gpu else ()
        if wanted and wanted != here:
            raise EngineError(
                f"{backend.title} builds for the GPU of this machine ({', '.join(here) or 'none'}), not for "
                f"{', '.join(wanted)}; leave the targets out, or take --backend tensorrt-rtx"
            )
        return here
    for target in wanted:
        if target in TENSORRT_ONLY_TARGETS:
            raise EngineError(
                f"{backend.title} cannot target {target}; build with --backend tensorrt on the machine with that GPU"
            )
        if target not in backend.targets:
            raise EngineError(f"unknown target {target!r}; {backend.title} knows {', '.join(backend.targets)}")
    return wanted or backend.default_targets
