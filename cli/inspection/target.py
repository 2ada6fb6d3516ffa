"""`inspect`: which of its three kinds a target is."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from spike_export.artifacts.errors import ArtifactError
from spike_export.artifacts.manifest import MANIFEST_FILE
from spike_export.engines.plan.paths import find_plans
from spike_export.engines.plan_runtime import is_plan

_RECIPE_FILE = "recipe.json"


def inspect_target(target: Path, explain: Sequence[str], as_json: bool, console: Console) -> bool:
    """Show a plan (a file, or both halves of a split engine), a bundle or a run (folders).

    Args:
        explain: Modules of a run to explain, instead of its summary.

    Returns:
        Whether nothing deviates from what was planned; True where nothing was.

    Raises:
        ArtifactError: It is none of them, or modules are to be explained of what is no run.
    """
    plans = _plans(target)
    kind = "plan" if plans else _kind_of_folder(target)
    if explain and kind != "run":
        raise ArtifactError(f"{target}: --explain tells of a run's decisions, and this is a {kind}; leave it out")
    if plans:
        from spike_export.cli.inspection.plan import inspect_plan, print_inspections
        from spike_export.engines.plan.backend import detect_machine

        machine = detect_machine()
        inspections = [inspect_plan(plan, machine) for plan in plans]
        print_inspections(inspections, as_json, console)
        return all(inspection.proved for inspection in inspections)
    if kind == "bundle":
        from spike_export.cli.inspection.bundle import inspect_bundle, print_bundle

        print_bundle(inspect_bundle(target), as_json, console)
        return True
    from spike_export.cli.inspection.recipe_explanation import explain_modules, summarize_recipe

    if explain:
        explain_modules(target, explain, as_json, console)
    else:
        summarize_recipe(target, as_json, console)
    return True


def _plans(target: Path) -> tuple[Path, ...]:
    """Return the plan, or both of a split engine that is named like this; none for a folder."""
    if target.is_dir():
        return ()
    if is_plan(target):
        return find_plans(target)
    raise ArtifactError(f"{target}: there is no such file or folder; give a plan, a bundle or a run's directory")


def _kind_of_folder(target: Path) -> str:
    if (target / _RECIPE_FILE).exists():
        return "run"
    if (target / MANIFEST_FILE).exists():
        return "bundle"
    raise ArtifactError(
        f"{target}: holds neither {_RECIPE_FILE}, as a run that calibrated does, nor {MANIFEST_FILE}, as a bundle "
        "does; give one of them, or a plan"
    )
