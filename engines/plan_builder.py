"""From a bundle to `engine.plan` and `engine.json`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from spike_export.calibration.atomic_write import atomic_path
from spike_export.calibration.errors import EngineError
from spike_export.calibration.progress import Progress, silent
from spike_export.engines.build_options import BuildOptions
from spike_export.engines.build_profiles import Limits, resolve_limits
from spike_export.engines.build_request import BuildRequest, CompletionEvent
from spike_export.engines.bundle_identity import file_size, hash_bundle
from spike_export.engines.child_process import BUILD_COMMAND, run_build
from spike_export.engines.host_memory import available_memory, require_memory
from spike_export.engines.plan_audit import ModuleAudit, PlanAudit
from spike_export.engines.plan_backend import (
    ChosenBackend,
    Machine,
    choose_backend,
    detect_machine,
    omission,
    resolve_targets,
)
from spike_export.engines.plan_sidecar import (
    Audit,
    AuditedModule,
    BackendVersion,
    PlanFile,
    PlanSidecar,
    save_sidecar,
    sidecar_path,
)
from spike_export.export.manifest import DATA_FILE, GRAPH_FILE, load_manifest


@dataclass(frozen=True)
class BuildEnvironment:
    """What a build takes from the machine; given in tests.

    Attributes:
        available: Bytes of memory that can be used; None when unknown.
        command: Program that builds.
    """

    machine: Machine
    available: int | None
    command: Sequence[str] = BUILD_COMMAND


@dataclass(frozen=True)
class BuildResult:
    """A finished plan.

    Attributes:
        warnings: What TensorRT warned of.
    """

    plan: Path
    sidecar: PlanSidecar
    audit: PlanAudit
    warnings: tuple[str, ...]

    @property
    def deviations(self) -> tuple[ModuleAudit, ...]:
        """Modules that do not run as planned; empty when the plan could not be read (`audit.readable`)."""
        return self.audit.deviations if self.audit.readable else ()


def detect_environment() -> BuildEnvironment:
    """Look at this machine."""
    return BuildEnvironment(detect_machine(), available_memory())


def build_plan(
    bundle: Path,
    plan: Path,
    options: BuildOptions,
    progress: Progress = silent,
    environment: BuildEnvironment | None = None,
) -> BuildResult:
    """Build a plan of a bundle, with its sidecar beside it; both appear whole or not at all.

    Args:
        bundle: Folder with model.onnx, model.onnx.data and manifest.json.
        plan: File to write, not ending in .json; one that is there is replaced.
        progress: Told of the hashing of the bundle (bytes) and of the build (percent).
        environment: This machine when omitted.

    Raises:
        EngineError: The backend, a target, a size, the memory or the graph stands in the way.
        ArtifactError: The bundle's manifest cannot be read, or the plan cannot be written.
        KeyboardInterrupt: As raised during the build; the build process is gone and nothing was written.
    """
    environment = environment or detect_environment()
    if plan == sidecar_path(plan):
        raise EngineError(f"{plan}: the plan's sidecar has this name; choose another ending, such as .plan")
    chosen = choose_backend(options.backend, environment.machine)
    manifest = load_manifest(bundle)
    float8 = "fp8" in manifest.linears
    targets = resolve_targets(chosen.backend, options.targets, environment.machine.gpu, float8=float8)
    note = omission(chosen.backend, options.targets) if float8 else None
    if note is not None:
        chosen = replace(chosen, reason=f"{chosen.reason}; {note}")
    limits = resolve_limits(options, manifest.cached_prefix_length, manifest.max_position_embeddings, manifest.capacity)
    _require_timing_cache(chosen, options)
    if not options.ignore_memory:
        require_memory(file_size(bundle / DATA_FILE), len(options.profiles), environment.available)
    with atomic_path(plan) as partial:
        partial.touch()  # a place that cannot be written to is found out now, not after the build
        identity = hash_bundle(bundle, progress)
        request = _request(bundle, partial, options, limits, chosen, targets)
        completion = run_build(request, progress, environment.command)
    sidecar = _sidecar(completion, chosen, targets, limits, identity)
    save_sidecar(sidecar, plan)
    return BuildResult(plan, sidecar, completion.audit, completion.warnings)


def _require_timing_cache(chosen: ChosenBackend, options: BuildOptions) -> None:
    if options.timing_cache is not None and not chosen.backend.timing_cache:
        raise EngineError(
            f"{chosen.backend.title} builds without timing kernels and keeps no timing cache; leave it out"
        )


def _request(
    bundle: Path, partial: Path, options: BuildOptions, limits: Limits, chosen: ChosenBackend, targets: tuple[str, ...]
) -> BuildRequest:
    return BuildRequest(
        backend=chosen.backend.name,
        graph=str((bundle / GRAPH_FILE).absolute()),
        plan=str(partial.absolute()),
        targets=targets if chosen.backend.targets else (),
        profiles=options.profiles,
        batch=(limits.batch.smallest, limits.batch.typical, limits.batch.largest),
        context=limits.context,
        typical_prompt=limits.typical_prompt,
        max_prompt=limits.max_prompt,
        prefix=limits.prefix,
        optimization_level=options.optimization_level,
        timing_cache=str(options.timing_cache.absolute()) if options.timing_cache else None,
    )


def _sidecar(
    completion: CompletionEvent, chosen: ChosenBackend, targets: tuple[str, ...], limits: Limits, identity: str
) -> PlanSidecar:
    return PlanSidecar(
        backend=BackendVersion(name=chosen.backend.name, version=completion.version, reason=chosen.reason),
        targets=targets,
        profiles=completion.profiles,
        prefix=limits.prefix,
        max_context=limits.context,
        bundle_sha256=identity,
        plan=PlanFile(sha256=completion.plan_sha256, size=completion.plan_size),
        build_seconds=completion.seconds,
        peak_memory=completion.peak_memory,
        audit=_audit(completion.audit),
    )


def _audit(audit: PlanAudit) -> Audit:
    return Audit(
        readable=audit.readable,
        int8_products=audit.int8_products,
        fp8_products=audit.fp8_products,
        other_products=audit.other_products,
        modules={
            module.module: AuditedModule(planned=module.planned, found=module.found, as_planned=module.as_planned)
            for module in audit.modules
        },
        evidence=audit.evidence.sentence,
        programs=audit.programs,
    )
