"""The engine of a bundle."""

from pathlib import Path

from spike_export.artifacts.files.sole_writer import sole_writer
from spike_export.artifacts.progress import Progress, silent
from spike_export.engines.build.reuse import ProvidedEngine, provide_engine
from spike_export.engines.plan.build_options import BuildOptions


def build(
    bundle: Path | str,
    out: Path | str,
    options: BuildOptions = BuildOptions(),
    *,
    progress: Progress = silent,
    force: bool = False,
    overwrite: bool = False,
) -> ProvidedEngine:
    """Build the engine of a bundle, and read from its plan in which precision each module runs.

    An engine that is there is kept while bundle, options, backend and GPU are the same. `complaint` of the result says
    which module does not run in the planned precision.

    Args:
        bundle: Folder that `export` wrote.
        out: The plan to write; its description goes beside it. A split engine's plans are named after it.
        options: What the plan is built for.
        progress: Told of the hashing of bundle and plan (bytes) and of the build (percent).
        force: Build although nothing has changed.
        overwrite: Replace also files that are no plan of ours.

    Raises:
        EngineError: The backend, an option, a size, the memory or the graph stands in the way.
        ArtifactError: The bundle's manifest cannot be read, or a plan cannot be written, or another process
            builds it.
    """
    with sole_writer(Path(out)):
        return provide_engine(Path(bundle), Path(out), options, progress, force=force, overwrite=overwrite)
