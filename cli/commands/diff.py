"""`spike-export diff RUN_A RUN_B`: what differs between two runs of one model."""

from functools import partial
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from spike_export.cli.arguments import AsJson, ProgramArguments
from spike_export.cli.exit_codes import DONE
from spike_export.cli.terminal.output import Output


def diff(
    first: Annotated[Path, Parameter(name="RUN_A", help="Work directory of a run.")],
    second: Annotated[Path, Parameter(name="RUN_B", help="Work directory of another run of the same model.")],
    /,
    *,
    as_json: AsJson = False,
    run_options: ProgramArguments = ProgramArguments(),
) -> int:
    """Compare two runs: choices, precision and ratios of the modules, accuracy with paired intervals."""
    from spike_export.cli.terminal.difference_table import print_difference
    from spike_export.inspection.difference import difference

    found = difference(first, second)
    Output(as_json=as_json).result(found.document(), partial(print_difference, found))
    return DONE
