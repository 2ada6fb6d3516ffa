"""Opens an engine plan to decode with: which bundle it belongs to, whether it may be loaded, and TensorRT over it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spike_export.artifacts.errors import EngineError
from spike_export.artifacts.files.sole_writer import finish_dead_replacement
from spike_export.artifacts.manifest import MANIFEST_FILE
from spike_export.artifacts.progress import Progress, silent
from spike_export.engines.generation.decoding import Decoding
from spike_export.engines.plan.backend import detect_machine
from spike_export.engines.plan.paths import find_plans, plan_paths, run_folder
from spike_export.engines.plan.safety import usable_engine

if TYPE_CHECKING:
    from spike_export.engines.tensorrt.decoding import TensorRtDecoding
    from spike_export.engines.tensorrt.engines import RuntimeOptions


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
    bundle = run_folder(engine) / "bundle"
    finish_dead_replacement(bundle)
    if not (bundle / MANIFEST_FILE).is_file():
        raise EngineError(
            f"{engine}: the plan needs the tokenizer of the bundle that it was built from, and {bundle} is not there; "
            "name the bundle with --bundle"
        )
    return bundle


def open_plans(
    engines: Sequence[Path],
    bundle: Path,
    progress: Progress = silent,
    *,
    rebuild: bool = False,
    runtime: "RuntimeOptions | None" = None,
) -> Decoding:
    """Open engines of one bundle; of several each batch goes to the one with the least context that has room for it.

    Args:
        engines: Each the file of a plan, or the name of a split engine (see `plan.paths`).
        bundle: What they were built from.
        progress: Told of the hashing (bytes) and of a build (percent).
        rebuild: Build those again that were built here and cannot be used any more.
        runtime: How to run them; on the first GPU when omitted.

    Raises:
        EngineError: A plan is missing, foreign or stale, or this machine cannot run it; with the reason.
        ArtifactError: A plan that is to be rebuilt cannot be written.
    """
    opened: list[TensorRtDecoding] = []
    try:
        for engine in engines:
            opened.append(_open_plan(engine, bundle, progress, rebuild, runtime))
        if len(opened) == 1:
            return opened[0]
        from spike_export.engines.tensorrt.capacities import CapacityChoice

        return CapacityChoice(opened)
    except BaseException:
        for plan in opened:
            plan.close()
        raise


def _open_plan(
    engine: Path, bundle: Path, progress: Progress, rebuild: bool, runtime: "RuntimeOptions | None"
) -> "TensorRtDecoding":
    gpu = runtime.gpu if runtime is not None else 0
    if rebuild:
        if gpu:
            raise EngineError(
                f"--rebuild builds on the first GPU, and --gpu {gpu} names another; leave one of them out, or show "
                f"only that GPU with CUDA_VISIBLE_DEVICES={gpu}"
            )
        # Importing the builder takes a tenth of a second, which a bundle in ONNX Runtime would wait for too.
        from spike_export.engines.build.rebuild import usable_or_rebuilt_engine

        plans = usable_or_rebuilt_engine(engine, bundle, progress)
    else:
        machine = detect_machine(gpu)
        if gpu and machine.gpu is None:
            raise EngineError(f"there is no GPU number {gpu}; nvidia-smi lists the GPUs")
        plans = usable_engine(engine, bundle, machine, progress)
    from spike_export.engines.tensorrt.decoding import TensorRtDecoding
    from spike_export.engines.tensorrt.engines import RuntimeOptions

    return TensorRtDecoding(plans, options=runtime or RuntimeOptions(), bundle=bundle)
