"""What is in a target, whichever of the three kinds it is."""

from pathlib import Path
from typing import Literal, TypeAlias

from spike_export.artifacts.errors import ArtifactError
from spike_export.artifacts.files.sole_writer import finish_dead_replacement
from spike_export.artifacts.manifest import MANIFEST_FILE
from spike_export.engines.plan.backend import detect_machine
from spike_export.engines.plan.paths import find_plans
from spike_export.engines.plan_runtime import is_plan
from spike_export.inspection.bundle import BundleInspection, inspect_bundle
from spike_export.inspection.plan import EngineInspection, inspect_plan
from spike_export.inspection.run import RECIPE_FILE, RunInspection, inspect_run

Inspection: TypeAlias = EngineInspection | BundleInspection | RunInspection


def inspect(target: Path | str, *, trust_plan: bool = False) -> Inspection:
    """Return what an engine really runs, what a bundle holds, or what a run decided.

    Args:
        target: A plan, or the name that the plans of a split engine share; a bundle's folder; the work directory of a
            run that calibrated.
        trust_plan: Load a plan of TensorRT that was not built here, too: on a GPU it is read by loading it, and a plan
            is code.

    Raises:
        ArtifactError: The target is none of these, or its manifest cannot be read.
        RecipeError: The run's recipe cannot be read.
        EngineError: The plan, or the bundle's graph, cannot be read; or the plan is a foreign one that would have to
            be loaded.
    """
    target = Path(target)
    kind = kind_of(target)
    if kind == "plan":
        machine = detect_machine()
        plans = (inspect_plan(plan, machine, trusted=trust_plan) for plan in find_plans(target))
        return EngineInspection(tuple(plans))
    return inspect_run(target) if kind == "run" else inspect_bundle(target)


def kind_of(target: Path) -> Literal["plan", "bundle", "run"]:
    """Return what a target is, from the names of its files.

    Raises:
        ArtifactError: There is nothing at this place, or none of the three.
    """
    finish_dead_replacement(target)
    if is_plan(target):
        return "plan"
    if (target / RECIPE_FILE).exists():
        return "run"
    if (target / MANIFEST_FILE).exists():
        return "bundle"
    if target.is_dir():
        raise ArtifactError(
            f"{target}: holds neither {RECIPE_FILE}, as a run that calibrated does, nor {MANIFEST_FILE}, as a bundle "
            "does; give one of them, or a plan"
        )
    raise ArtifactError(f"{target}: there is no such file or folder; give a plan, a bundle or a run's directory")
