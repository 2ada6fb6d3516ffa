"""`spike-export inspect`: what is in a plan, a bundle or a run."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from spike_export.cli.arguments import RunArguments
from spike_export.cli.exit_codes import DONE, GATE_MISSED


def inspect(
    target: Annotated[Path, Parameter(help="A plan, a bundle's folder, or the work directory of a run.")],
    /,
    *,
    explain: Annotated[
        tuple[str, ...],
        Parameter(help="Of a run: module, e.g. model.layers.11.mlp.down_proj or 11.mlp.down_proj; repeatable."),
    ] = (),
    as_json: Annotated[bool, Parameter(name="--json", negative="", help="Print JSON instead of tables.")] = False,
    run_options: RunArguments = RunArguments(),
) -> int:
    """Show what a plan really runs, what a bundle holds, or what a run decided and why."""
    from spike_export.cli.inspection.target import inspect_target

    return DONE if inspect_target(target, explain, as_json, Console()) else GATE_MISSED
