"""`spike-export inspect`: what is in a plan, a bundle or a run."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from spike_export.cli.arguments import AsJson, RunArguments
from spike_export.cli.exit_codes import DONE, GATE_MISSED
from spike_export.cli.terminal.output import Output


def inspect(
    target: Annotated[Path, Parameter(help="Plan, folder of a bundle, or work directory of a run.")],
    /,
    *,
    explain: Annotated[
        tuple[str, ...],
        Parameter(
            help="Module of a run, such as 11.mlp.down_proj or lm_head: show why it has its precision; repeatable."
        ),
    ] = (),
    trust_plan: Annotated[
        bool,
        Parameter(
            negative="",
            help="Inspect a plan of TensorRT that was not built here, too: on a GPU it is read by loading it, and a "
            "plan is code.",
        ),
    ] = False,
    as_json: AsJson = False,
    run_options: RunArguments = RunArguments(),
) -> int:
    """Show the precision that a plan runs in, the content of a bundle, or the choices of a run and their reasons."""
    from spike_export.cli.inspection.target import inspect_target

    proved = inspect_target(target, explain, Output(as_json=as_json), trust_plan=trust_plan)
    return DONE if proved else GATE_MISSED
