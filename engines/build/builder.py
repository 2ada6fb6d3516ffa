"""From a bundle to `engine.plan` and `engine.json`."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from spike_export.artifacts.errors import ArtifactError, EngineError
from spike_export.artifacts.files.atomic_write import atomic_path, describe_os_error, require_writable
from spike_export.artifacts.manifest import DATA_FILE, GRAPH_FILE, load_manifest
from spike_export.artifacts.process.host_memory import available_memory
from spike_export.artifacts.progress import Progress
from spike_export.engines.audit.verdict import ModuleAudit, PlanAudit
from spike_export.engines.build.child_process import BUILD_COMMAND, run_build
from spike_export.engines.build.host_memory import require_memory
from spike_export.engines.build.request import BuildRequest, CompletionEvent
from spike_export.engines.plan.backend import (
    ChosenBackend,
    Machine,
    choose_backend,
    detect_machine,
    omission,
    require_features,
    require_float8_compatibility,
    resolve_targets,
)
from spike_export.engines.plan.build_options import (
    DEFAULT_OPTIMIZATION_LEVEL,
    SPLIT_PROFILES,
    BuildOptions,
    ProfileName,
)
from spike_export.engines.plan.build_profiles import Limits, resolve_limits
from spike_export.engines.plan.bundle_identity import file_size, hash_bundle
from spike_export.engines.plan.bundle_ropes import rope_by_length
from spike_export.engines.plan.paths import plan_paths, require_file_names
from spike_export.engines.plan.sidecar import (
    Audit,
    AuditedModule,
    BackendVersion,
    PlanFile,
    PlanKey,
    PlanSidecar,
    sidecar_path,
    sidecar_text,
)


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
        """Modules that are not proved to run as planned: all, when the plan could not be read (`audit.readable`)."""
        return self.audit.deviations


def detect_environment() -> BuildEnvironment:
    """Look at this machine."""
    return BuildEnvironment(detect_machine(), available_memory())


@dataclass(frozen=True)
class PlannedBuild:
    """An engine to build, everything decided and found possible.

    Attributes:
        engine: File of the plan, or of which the plans of a split engine have their names.
        device: Name of the GPU, where the backend compiles for the one at hand.
        version: Of the backend that is installed.
        weight_bytes: Size of the bundle's data file.
        rope: The model's, where it depends on a sequence's length.
    """

    bundle: Path
    engine: Path
    options: BuildOptions
    chosen: ChosenBackend
    targets: tuple[str, ...]
    limits: Limits
    device: str | None
    version: str
    weight_bytes: int
    rope: str | None

    def key(self, identity: str) -> PlanKey:
        """Return what the engine follows from; `identity` is the bundle's hash."""
        options, limits = self.options, self.limits
        level = options.optimization_level
        return PlanKey(
            tool=version("spike-export"),
            bundle=identity,
            backend=self.chosen.backend.name,
            version=self.version,
            targets=self.targets,
            device=self.device,
            profiles=SPLIT_PROFILES if options.split else options.profiles,
            split=options.split,
            batch=(limits.batch.smallest, limits.batch.typical, limits.batch.largest),
            context=limits.context,
            typical_prompt=limits.typical_prompt,
            max_prompt=limits.max_prompt,
            capacity=options.capacity,
            optimization_level=DEFAULT_OPTIMIZATION_LEVEL if level is None else level,
            refit=options.refit,
            strip_weights=options.strip_weights,
            weight_streaming=options.weight_streaming,
            hardware_compatible=options.hardware_compatible,
            version_compatible=options.version_compatible,
        )


def plan_build(bundle: Path, engine: Path, options: BuildOptions, environment: BuildEnvironment) -> PlannedBuild:
    """Decide on everything a build needs, and refuse what cannot be built, before anything is read or written.

    Raises:
        EngineError: The backend, an option, a target, a size or the name of the plan stands in the way, or the
            bundle is damaged.
        ArtifactError: The bundle's manifest cannot be read.
    """
    require_file_names(engine, options.split)
    machine = environment.machine
    chosen = choose_backend(options.backend, machine)
    manifest = load_manifest(bundle)
    if (manifest.kv_cache, manifest.cache_type) == ("static", "int8"):
        raise EngineError(
            f"{bundle}: TensorRT does not write into a static cache in INT8; export with --kv-cache dynamic, or with "
            "--kv-cache-dtype unquantized"
        )
    float8 = "fp8" in manifest.linears
    targets = resolve_targets(chosen.backend, options.targets, machine.gpu, float8=float8)
    note = omission(chosen.backend, options.targets) if float8 else None
    if note is not None:
        chosen = replace(chosen, reason=f"{chosen.reason}; {note}")
    require_features(chosen.backend, options.features, machine.gpu)
    require_float8_compatibility(options.hardware_compatible, float8=float8)
    limits = resolve_limits(options, manifest.cached_prefix_length, manifest.max_position_embeddings, manifest.capacity)
    found = machine.version(chosen.backend.name)
    if found is None:
        raise EngineError(f"{chosen.backend.title} cannot be loaded; run: {chosen.backend.install}")
    return PlannedBuild(
        bundle=bundle,
        engine=engine,
        options=options,
        chosen=chosen,
        targets=targets,
        limits=limits,
        device=machine.gpu.name if machine.gpu and chosen.backend.needs_gpu else None,
        version=found,
        weight_bytes=file_size(bundle / DATA_FILE),
        rope=rope_by_length(bundle),
    )


def build_engine(
    build: PlannedBuild, identity: str | None, progress: Progress, environment: BuildEnvironment
) -> tuple[BuildResult, ...]:
    """Build the plans of an engine one after another, each in a process of its own.

    All appear, and their sidecars with them, or none.

    Args:
        identity: The bundle's hash, where it is known already.

    Raises:
        EngineError: The memory or the graph stands in the way.
        ArtifactError: A plan or the timing cache cannot be written.
    """
    options, plans = build.options, plan_paths(build.engine, build.options.split)
    if not options.ignore_memory:
        require_memory(build.weight_bytes, max(map(len, options.plan_profiles)), environment.available)
    if options.timing_cache:
        require_writable(options.timing_cache.parent)  # it is written when the plan is built, which then would be lost
    with ExitStack() as stack:
        # Entered last, the plans take their places first: what can go wrong with their many bytes does so before.
        descriptions = [stack.enter_context(atomic_path(sidecar_path(plan))) for plan in plans]
        partials = [stack.enter_context(atomic_path(plan)) for plan in plans]
        for partial in (*partials, *descriptions):
            partial.touch()  # a place that cannot be written to is found out now, not after the build
        key = build.key(identity or hash_bundle(build.bundle, progress))
        requests = [
            _request(build, key, partial, profiles)
            for partial, profiles in zip(partials, options.plan_profiles, strict=True)
        ]
        completions = [
            _run(request, plan, progress, environment) for request, plan in zip(requests, plans, strict=True)
        ]
        sidecars = [_sidecar(build, key, completion) for completion in completions]
        for sidecar, description in zip(sidecars, descriptions, strict=True):
            description.write_text(sidecar_text(sidecar), encoding="utf-8")
    return tuple(
        BuildResult(plan, sidecar, completion.audit, completion.warnings)
        for plan, sidecar, completion in zip(plans, sidecars, completions, strict=True)
    )


def _run(request: BuildRequest, plan: Path, progress: Progress, environment: BuildEnvironment) -> CompletionEvent:
    try:
        return run_build(request, progress, environment.command)
    except OSError as error:  # here, where it is known which of two plans it was
        raise ArtifactError(describe_os_error(error, plan)) from error


def _request(build: PlannedBuild, key: PlanKey, partial: Path, profiles: tuple[ProfileName, ...]) -> BuildRequest:
    options, backend = build.options, build.chosen.backend
    return BuildRequest(
        backend=backend.name,
        graph=str((build.bundle / GRAPH_FILE).absolute()),
        plan=str(partial.absolute()),
        targets=build.targets if backend.targets else (),
        profiles=profiles,
        batch=key.batch,
        context=key.context,
        typical_prompt=key.typical_prompt,
        max_prompt=key.max_prompt,
        prefix=build.limits.prefix,
        slots=build.limits.slots,
        optimization_level=key.optimization_level,
        features=options.features,
        hardware_compatible=options.hardware_compatible,
        timing_cache=str(options.timing_cache.absolute()) if options.timing_cache else None,
    )


def _sidecar(build: PlannedBuild, key: PlanKey, completion: CompletionEvent) -> PlanSidecar:
    return PlanSidecar(
        key=key,
        backend=BackendVersion(name=build.chosen.backend.name, version=completion.version, reason=build.chosen.reason),
        targets=build.targets,
        profiles=completion.profiles,
        prefix=build.limits.prefix,
        max_context=build.limits.context,
        rope_by_length=build.rope,
        bundle_sha256=key.bundle,
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
