"""Where the plans of an engine lie: one file for both uses, or one for prefill and one for decode."""

from pathlib import Path

from spike_export.artifacts.errors import EngineError
from spike_export.engines.plan.build_options import SPLIT_PROFILES, ProfileName
from spike_export.engines.plan.sidecar import sidecar_path


def run_folder(engine: Path) -> Path:
    """Return where the main job puts what belongs to an engine, the bundle too, unless another folder is named."""
    return engine.parent / f"{engine.name}.run"


def split_path(engine: Path, profile: ProfileName) -> Path:
    """Return the plan of one profile of a split engine: `engine.plan` → `engine.decode.plan`, `engine` too.

    An ending is needed: the sidecar of `engine.decode` would be that of `engine`.
    """
    return engine.with_name(f"{engine.stem}.{profile}{engine.suffix or '.plan'}")


def plan_paths(engine: Path, split: bool) -> tuple[Path, ...]:
    """Return the plans an engine of this name consists of, whether they are there or not."""
    return tuple(split_path(engine, profile) for profile in SPLIT_PROFILES) if split else (engine,)


def artifact_paths(engine: Path, split: bool) -> tuple[Path, ...]:
    """Return the plans and their sidecars."""
    return tuple(path for plan in plan_paths(engine, split) for path in (plan, sidecar_path(plan)))


def require_file_names(engine: Path, split: bool) -> None:
    """Refuse a name under which the plans and sidecars of an engine cannot be written as files.

    Raises:
        EngineError: A folder has the name, or it is the sidecar's.
    """
    folders = [path for path in (engine, *(artifact_paths(engine, split) if engine.name else ())) if path.is_dir()]
    if folders:
        raise EngineError(f"{folders[0]}: is a folder; give the plan a file name, such as {folders[0] / 'engine.plan'}")
    if engine == sidecar_path(engine):
        raise EngineError(f"{engine}: the plan's description has this name; choose another ending, such as .plan")


def find_plans(engine: Path) -> tuple[Path, ...]:
    """Return the plans of an engine that is there: the file of this name, or the two beside it that bear its name.

    Raises:
        EngineError: There is none, or only one half of a split engine.
    """
    if engine.exists():
        return (engine,)
    halves = plan_paths(engine, split=True)
    missing = [path for path in halves if not path.exists()]
    if not missing:
        return halves
    if len(missing) < len(halves):
        raise EngineError(f"{missing[0]} is missing, the other half of the engine is there; build the engine again")
    raise EngineError(f"{engine}: no such plan, and none of its halves {halves[0].name} and {halves[1].name} either")
