"""Opens an engine plan to decode with: which bundle it belongs to, whether it may be loaded, and TensorRT over it."""

from pathlib import Path

from spike_export.calibration.errors import EngineError
from spike_export.calibration.progress import Progress, silent
from spike_export.engines.decoding import Decoding
from spike_export.engines.plan_backend import detect_machine
from spike_export.engines.plan_paths import find_plans, plan_paths
from spike_export.engines.plan_rebuild import usable_or_rebuilt_engine
from spike_export.engines.plan_safety import usable_engine
from spike_export.export.manifest import MANIFEST_FILE


def is_plan(path: Path) -> bool:
    """Return whether a path is meant as an engine, whole or split, and not as a bundle, which is a folder."""
    if path.is_dir() or not path.name:
        return False
    return path.is_file() or path.suffix == ".plan" or any(half.is_file() for half in plan_paths(path, split=True))


def bundle_of(engine: Path, given: Path | None = None) -> Path:
    """Return the bundle of an engine, which has tokenizer and manifest: the given one, or the main job's.

    Raises:
        EngineError: There is none at that place.
    """
    find_plans(engine)
    if given is not None:
        return given  # what is wrong with it is said where it is read
    bundle = engine.with_name(f"{engine.name}.run") / "bundle"
    if not (bundle / MANIFEST_FILE).is_file():
        raise EngineError(
            f"{engine}: the tokenizer is in the bundle that the plan was built from, and that is not at {bundle}; name "
            "it with --bundle"
        )
    return bundle


def open_plan(engine: Path, bundle: Path, progress: Progress = silent, *, rebuild: bool = False) -> Decoding:
    """Open an engine on the first GPU.

    Args:
        engine: File of the plan, or the name of a split engine (see `plan_paths`).
        bundle: What it was built from.
        progress: Told of the hashing (bytes) and of a build (percent).
        rebuild: Build it again where it was built here and cannot be used any more.

    Raises:
        EngineError: The plan is missing, foreign or stale, or this machine cannot run it; with the reason.
        ArtifactError: A plan that is to be rebuilt cannot be written.
    """
    if rebuild:
        plans = usable_or_rebuilt_engine(engine, bundle, progress)
    else:
        plans = usable_engine(engine, bundle, detect_machine(), progress)
    from spike_export.engines.trt_decoding import TensorRtDecoding

    return TensorRtDecoding(plans, bundle=bundle)
