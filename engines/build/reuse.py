"""An engine for a bundle: the one that is there where nothing it follows from has changed, else built anew."""

from dataclasses import dataclass
from pathlib import Path

from spike_export.artifacts.errors import ArtifactError, EngineError
from spike_export.artifacts.ownership import require_replaceable
from spike_export.artifacts.progress import Progress, silent
from spike_export.engines.build.builder import (
    BuildEnvironment,
    build_engine,
    detect_environment,
    plan_build,
)
from spike_export.engines.plan.build_options import BuildOptions
from spike_export.engines.plan.bundle_identity import hash_bundle, hash_plan
from spike_export.engines.plan.paths import plan_paths
from spike_export.engines.plan.sidecar import (
    PlanKey,
    PlanSidecar,
    finish_interrupted,
    is_sidecar,
    load_sidecar,
    sidecar_path,
)

KEPT = "kept: nothing it was built from has changed"


@dataclass(frozen=True)
class ProvidedEngine:
    """Plans that belong to a bundle and its options.

    Attributes:
        plans: One, or one for prefill and one for decode.
        sidecars: Of the plans, in their order.
        note: Whether the engine was kept or built, and what has changed since it was built before.
        reused: Nothing was built.
        warnings: What TensorRT said against the graph while it built.
    """

    plans: tuple[Path, ...]
    sidecars: tuple[PlanSidecar, ...]
    note: str
    reused: bool
    warnings: tuple[str, ...] = ()

    @property
    def deviations(self) -> tuple[str, ...]:
        """Modules that are not proved to run as planned in some plan: all of a plan that could not be read."""
        found = (
            name for sidecar in self.sidecars for name, module in sidecar.audit.modules.items() if not module.as_planned
        )
        return tuple(dict.fromkeys(found))

    @property
    def complaint(self) -> str | None:
        """What is wrong with the precision the engine runs in, or why it is not known; None where nothing is."""
        wrong = self.deviations
        if not wrong:
            return None
        if self.unproved is not None:
            return f"nothing proves in which precision the plan runs: {self.unproved}"
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        plan = next(
            plan
            for plan, sidecar in zip(self.plans, self.sidecars, strict=True)
            if not all(module.as_planned for module in sidecar.audit.modules.values())
        )
        return f"{wrong[0]}{more} does not run in the planned precision; see `spike-export inspect {plan}`"

    @property
    def unproved(self) -> str | None:
        """Why nothing is known of some plan's precision; None where all could be read."""
        return next((sidecar.audit.evidence for sidecar in self.sidecars if not sidecar.audit.readable), None)


def provide_engine(
    bundle: Path,
    engine: Path,
    options: BuildOptions,
    progress: Progress = silent,
    environment: BuildEnvironment | None = None,
    *,
    force: bool = False,
    overwrite: bool = False,
) -> ProvidedEngine:
    """Return the engine of a bundle, built only where it has to be.

    Args:
        bundle: Folder with model.onnx, model.onnx.data and manifest.json.
        engine: File of the plan; a split engine's plans are named after it (`plan.paths`). One that is there is
            replaced, in either form.
        progress: Told of the hashing of bundle and plan (bytes) and of the build (percent).
        environment: This machine when omitted.
        force: Build in any case.
        overwrite: Replace also what is no engine of ours.

    Raises:
        EngineError: The backend, an option, a size, the memory or the graph stands in the way, or a file that is no
            engine of ours has the name of a split one.
        ArtifactError: The bundle's manifest cannot be read, a plan cannot be written, or a foreign file is in the
            plan's place.
        KeyboardInterrupt: As raised during a build; what was there before is still there.
    """
    environment = environment or detect_environment()
    build = plan_build(bundle, engine, options, environment)
    require_own_place(engine, options.split, overwrite=overwrite)
    plans, other = plan_paths(engine, options.split), plan_paths(engine, not options.split)
    former = other if all(plan.exists() and _is_form(plan, engine) for plan in other) else None
    earlier = plans if all(plan.exists() for plan in plans) else former
    identity, note = None, "built"
    if earlier is None:
        halves = [plan for plan in plans if plan.exists()]
        note = f"built again: the other half of {halves[0]} is missing" if halves else note
    elif force:
        note = "built again: as asked for"
    else:
        reason = _unreadable(earlier)
        if reason is None:
            identity = hash_bundle(bundle, progress)
            changes = build.key(identity).changes_since(_key(earlier[0]))
            reason = "; ".join(changes) or _altered(earlier, progress)
        if reason is None:
            _discard(other, engine)
            return ProvidedEngine(plans, tuple(load_sidecar(plan) for plan in plans), KEPT, reused=True)
        note = f"built again: {reason}"
    results = build_engine(build, identity, progress, environment)
    _discard(other, engine)
    warnings = tuple(dict.fromkeys(warning for result in results for warning in result.warnings))
    return ProvidedEngine(plans, tuple(result.sidecar for result in results), note, reused=False, warnings=warnings)


def require_own_place(engine: Path, split: bool, *, overwrite: bool = False) -> None:
    """Refuse to replace files that are no engine of ours, and to build a split engine beside a file of its name.

    A file of a split engine's name would be taken for the engine.

    Raises:
        EngineError: Names the file that would be taken for the engine.
        ArtifactError: Names the file that would be lost.
    """
    for plan in plan_paths(engine, split):
        finish_interrupted(plan)
        require_replaceable(sidecar_path(plan), "the description of a plan", is_sidecar, overwrite=overwrite)
        require_replaceable(plan, "a plan", lambda path: is_sidecar(sidecar_path(path)), overwrite=overwrite)
    if split and engine.exists() and not sidecar_path(engine).is_file():
        names = " and ".join(path.name for path in plan_paths(engine, split=True))
        raise EngineError(
            f"{engine} exists and was not built here; a split engine is {names}, and {engine.name} would be mistaken "
            "for it: remove that file, or choose another name"
        )


def _unreadable(plans: tuple[Path, ...]) -> str | None:
    """Return why nothing can be said of plans that are there; None where their sidecars tell one key."""
    keys = set()
    for plan in plans:
        try:
            key = load_sidecar(plan).key
        except ArtifactError as error:
            return str(error).removesuffix("; build the plan again")
        if key is None:
            return f"{sidecar_path(plan)} is of an older version"
        keys.add(key)
    return "its plans are of different builds" if len(keys) > 1 else None


def _altered(plans: tuple[Path, ...], progress: Progress) -> str | None:
    """Return which plan has other bytes than were built; None when none has."""
    altered = [plan for plan in plans if hash_plan(plan, progress) != load_sidecar(plan).plan.sha256]
    return f"{altered[0]} is not the file that was built" if altered else None


def _key(plan: Path) -> PlanKey:
    key = load_sidecar(plan).key
    assert key is not None, "a plan without a key counts as unreadable"
    return key


def _is_form(plan: Path, engine: Path) -> bool:
    """Return whether a plan was built as the engine or as half of it, and does not merely have a half's name."""
    if plan == engine:
        return sidecar_path(plan).is_file()
    try:
        key = load_sidecar(plan).key
    except ArtifactError:
        return False
    return key is not None and key.split


def _discard(plans: tuple[Path, ...], engine: Path) -> None:
    """Remove what the engine was in its other form: it would be taken for the engine, or for a part of it."""
    for plan in plans:
        if _is_form(plan, engine):
            plan.unlink(missing_ok=True)
            sidecar_path(plan).unlink()
