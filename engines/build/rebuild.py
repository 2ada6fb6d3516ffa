"""A plan that has gone stale is built again from its bundle, as it was built before, for the machine that is here."""

from pathlib import Path

from spike_export.artifacts.errors import ArtifactError, EngineError
from spike_export.artifacts.files.sole_writer import sole_writer
from spike_export.artifacts.progress import Progress, silent
from spike_export.engines.build.builder import BuildEnvironment, detect_environment
from spike_export.engines.build.reuse import provide_engine
from spike_export.engines.plan.backend import BACKENDS, Gpu
from spike_export.engines.plan.build_options import BatchRange, BuildOptions
from spike_export.engines.plan.paths import find_plans
from spike_export.engines.plan.safety import CheckedPlan, StalePlanError, usable_engine
from spike_export.engines.plan.sidecar import PlanKey, load_sidecar


def usable_or_rebuilt_engine(
    engine: Path, bundle: Path, progress: Progress = silent, environment: BuildEnvironment | None = None
) -> tuple[CheckedPlan, ...]:
    """Return the plans of an engine that may be loaded here, built again where they may not.

    Args:
        engine: File of the plan, or the name of a split engine (see `plan.paths`).
        bundle: What it is built from.
        environment: This machine when omitted.

    Raises:
        EngineError: A plan is missing or foreign: it was not built here, and is not overwritten. Or the build fails, or
            what was built is not proved to run as planned; it is there, and counts as usable from then on.
        ArtifactError: The bundle's manifest cannot be read, or a plan cannot be written.
    """
    environment = environment or detect_environment()
    try:
        return usable_engine(engine, bundle, environment.machine, progress)
    except StalePlanError:
        if environment.machine.gpu is None:
            raise  # what would be built could not run here either
        options = _options(engine, environment.machine.gpu)
    # Forced: a plan may have gone stale in ways its key does not tell.
    with sole_writer(engine):
        complaint = provide_engine(bundle, engine, options, progress, environment, force=True).complaint
    if complaint is not None:
        raise EngineError(
            f"{engine} was built again, and {complaint}; repeat the command to run the engine nevertheless"
        )
    return usable_engine(engine, bundle, environment.machine, progress)


def _options(engine: Path, gpu: Gpu) -> BuildOptions:
    """Return how the engine was built, for the GPU that is here."""
    for plan in find_plans(engine):
        try:
            key = load_sidecar(plan).key
        except ArtifactError:
            continue
        if key is not None:
            return _options_of(key, gpu)
    return BuildOptions(targets=(gpu.target,))


def _options_of(key: PlanKey, gpu: Gpu) -> BuildOptions:
    targets = key.targets if gpu.target in key.targets else (gpu.target,)
    buildable = BACKENDS[key.backend].targets
    return BuildOptions(
        backend=key.backend if not buildable or gpu.target in buildable else "auto",
        targets=targets,
        profiles=key.profiles,
        split=key.split,
        batch=BatchRange(*key.batch),
        capacity=key.capacity,
        max_context=key.context,
        typical_prompt=key.typical_prompt,
        max_prompt=key.max_prompt,
        optimization_level=key.optimization_level,
        refit=key.refit,
        strip_weights=key.strip_weights,
        weight_streaming=key.weight_streaming,
        hardware_compatible=key.hardware_compatible,
        version_compatible=key.version_compatible,
    )
