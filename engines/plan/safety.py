"""Whether a plan may be loaded here: asked of its first bytes, its sidecar and its hash, before anything runs of it.

A plan is code. What was not built here, or is no longer what was built, is refused before it is deserialized, and so
is what the backend would refuse in words of its own, or run wrong.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from spike_export.artifacts.errors import ArtifactError, EngineError
from spike_export.artifacts.progress import Progress, silent
from spike_export.engines.plan.backend import BACKENDS, Gpu, Machine
from spike_export.engines.plan.bundle_identity import hash_bundle, hash_plan
from spike_export.engines.plan.header import PlanHeader, read_header
from spike_export.engines.plan.paths import find_plans
from spike_export.engines.plan.sidecar import PlanSidecar, load_sidecar, sidecar_path


class StalePlanError(EngineError):
    """A plan of ours that cannot be used as it is; building it again from its bundle mends that."""


@dataclass(frozen=True, slots=True)
class CheckedPlan:
    """A plan that may be loaded."""

    path: Path
    sidecar: PlanSidecar


def usable_engine(
    engine: Path, bundle: Path | None, machine: Machine, progress: Progress = silent
) -> tuple[CheckedPlan, ...]:
    """Return the plans of an engine that may be loaded on this machine.

    Cheap questions come first: the header, the sidecar, sizes, backend and GPU, and at last what has to be hashed.

    Args:
        engine: File of the plan, or the name of a split engine (see `plan.paths`).
        bundle: What the plans should have been built from; None where that is not to be asked.
        machine: Where they are to run: its backends, their versions, its GPU.
        progress: Told of the hashing of bundle and plans (bytes).

    Raises:
        StalePlanError: A plan was built here, but for another backend version or GPU, from another bundle, or its
            bytes have changed since; or the two halves are of different builds. The reason is named.
        EngineError: A plan is missing; it is no plan or a foreign one; it lacks its weights and there is no bundle to
            take them from; or this machine cannot run plans.
    """
    identity = _identity(bundle, progress)
    plans = tuple(CheckedPlan(plan, _usable(plan, identity, machine, progress)) for plan in find_plans(engine))
    if len({plan.sidecar.key for plan in plans}) > 1:
        names = " and ".join(plan.path.name for plan in plans)
        raise StalePlanError(f"{engine}: {names} are of different builds; build the engine again")
    return plans


def require_own_plan(plan: Path) -> None:
    """Refuse a plan that was not built here, or is not what was built any more; nothing of it is run.

    Raises:
        StalePlanError: The sidecar cannot be read, or the plan's bytes have changed.
        EngineError: The plan is a foreign one: it has no sidecar.
    """
    _require_bytes(plan, _sidecar(plan, read_header(plan)), silent)


@dataclass(frozen=True, slots=True)
class _Identity:
    """A bundle, and its hash, which is computed when it is first asked for."""

    bundle: Path
    sha256: Callable[[], str]


def _identity(bundle: Path | None, progress: Progress) -> _Identity | None:
    return None if bundle is None else _Identity(bundle, cache(lambda: hash_bundle(bundle, progress)))


def _usable(plan: Path, identity: _Identity | None, machine: Machine, progress: Progress) -> PlanSidecar:
    header = read_header(plan)
    sidecar = _sidecar(plan, header)
    backend = BACKENDS[sidecar.backend.name]
    if header.backend is not backend or not _same_release(header.version, sidecar.backend.version):
        raise StalePlanError(
            f"{plan} is a plan of {header.title}, and its sidecar describes one of {backend.title} "
            f"{sidecar.backend.version}; build it again"
        )
    if header.size is not None and header.size != sidecar.plan.size:
        raise StalePlanError(
            f"{plan} has {header.size} bytes by its header and {sidecar.plan.size} bytes by its sidecar; build it again"
        )
    _require_backend(plan, sidecar, machine)
    _require_gpu(plan, sidecar, machine.gpu)
    if identity is None and sidecar.key is not None and sidecar.key.strip_weights:
        raise EngineError(f"{plan} was built without its weights; give the bundle it was built from, which has them")
    if identity is not None and identity.sha256() != sidecar.bundle_sha256:
        raise StalePlanError(f"{plan} was not built from the bundle that is now in {identity.bundle}; build it again")
    _require_bytes(plan, sidecar, progress)
    return sidecar


def _require_bytes(plan: Path, sidecar: PlanSidecar, progress: Progress) -> None:
    if hash_plan(plan, progress) != sidecar.plan.sha256:
        raise StalePlanError(f"{plan} is not the file that was built: its bytes have changed; build it again")


def _sidecar(plan: Path, header: PlanHeader) -> PlanSidecar:
    path = sidecar_path(plan)
    if not path.is_file():
        raise EngineError(
            f"{plan} is a foreign plan of {header.title}: {path.name} is missing. Plans are code; load none of unknown "
            "origin, and build it from its bundle"
        )
    try:
        return load_sidecar(plan)
    except ArtifactError as error:
        raise StalePlanError(str(error)) from error


def _require_backend(plan: Path, sidecar: PlanSidecar, machine: Machine) -> None:
    backend, built = BACKENDS[sidecar.backend.name], sidecar.backend.version
    here = machine.version(backend.name)
    if backend.name not in machine.installed or here is None:
        raise StalePlanError(f"{plan} needs {backend.title} {built}, which is not installed; run: {backend.install}")
    movable = sidecar.key is not None and sidecar.key.version_compatible
    if movable and _numbers(built)[:2] <= _numbers(here)[:2]:
        return
    if _numbers(built) != _numbers(here):
        later = ", or a later one" if movable else ""
        raise StalePlanError(
            f"{plan} was built by {backend.title} {built} and runs in that version only{later}; here is {here}: build "
            "it again"
        )


def _require_gpu(plan: Path, sidecar: PlanSidecar, gpu: Gpu | None) -> None:
    if gpu is None:
        raise EngineError(
            f"{plan} needs an NVIDIA GPU, and there is none here (or its driver is missing); run the bundle in ONNX "
            "Runtime instead"
        )
    key = sidecar.key
    compatible = key.hardware_compatible if key else None
    if compatible == "ampere-plus" and _capability(gpu.target) >= _capability("SM80"):
        return
    if gpu.target not in sidecar.targets:
        raise StalePlanError(
            f"{plan} was built for {', '.join(sidecar.targets)}, and the GPU here is {gpu.name} ({gpu.target}); build "
            "it again for that"
        )
    device = key.device if key else None
    if device is not None and device != gpu.name and compatible is None:
        raise StalePlanError(
            f"{plan} was built for the {device}, and the GPU here is {gpu.name}: build it again, or there with "
            "--hardware-compatible same-compute-capability"
        )


def _numbers(version: str) -> tuple[int, ...]:
    """Return the up to four leading numbers of a version: `1.7.1.116.post1` → (1, 7, 1, 116)."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:4])


def _same_release(header: str, version: str) -> bool:
    # The header has a byte for the build number, which may need more.
    return _numbers(header)[:3] == _numbers(version)[:3]


def _capability(target: str) -> int:
    return int(target.removeprefix("SM"))
