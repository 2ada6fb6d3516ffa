"""Shows what is in a target, for reading or as JSON."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from spike_export.artifacts.errors import ArtifactError
from spike_export.cli.inspection.bundle import print_bundle
from spike_export.cli.inspection.plan import print_plan
from spike_export.cli.inspection.run import print_explanations, print_run
from spike_export.cli.terminal.output import Output
from spike_export.inspection.plan import EngineInspection
from spike_export.inspection.run import RunInspection
from spike_export.inspection.target import Inspection, inspect, kind_of


def inspect_target(target: Path, explain: Sequence[str], output: Output, *, trust_plan: bool = False) -> bool:
    """Show a plan (or both of a split engine), a bundle or a run.

    Args:
        explain: Modules of a run to explain, instead of its summary.
        trust_plan: Load a plan of TensorRT that was not built here, too.

    Returns:
        Whether nothing deviates from what was planned; True where nothing was.

    Raises:
        SpikeExportError: The target is none of them or cannot be read, or `explain` names modules of something else.
    """
    kind = kind_of(target) if explain else "run"
    if kind != "run":
        raise ArtifactError(
            f"{target}: --explain needs the work directory of a run, and this is a {kind}; leave --explain out"
        )
    inspection = inspect(target, trust_plan=trust_plan)
    if isinstance(inspection, RunInspection) and explain:
        explained = inspection.explain(explain)
        output.result(explained, partial(print_explanations, explained))
    else:
        output.result(inspection.document(), partial(_print_tables, inspection))
    return inspection.proved if isinstance(inspection, EngineInspection) else True


def _print_tables(inspection: Inspection, console: Console) -> None:
    match inspection:
        case EngineInspection():
            for plan in inspection.plans:
                print_plan(plan, console)
        case RunInspection():
            print_run(inspection, console)
        case _:
            print_bundle(inspection, console)
