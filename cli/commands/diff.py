"""`spike-export diff RUN_A RUN_B`: what differs between two runs of one model."""

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from spike_export.cli.arguments import ProgramArguments
from spike_export.cli.exit_codes import DONE


def diff(
    first: Annotated[Path, Parameter(name="RUN_A", help="Work directory of a run.")],
    second: Annotated[Path, Parameter(name="RUN_B", help="Work directory of another run of the same model.")],
    /,
    *,
    as_json: Annotated[bool, Parameter(name="--json", negative="", help="Print JSON instead of tables.")] = False,
    run_options: ProgramArguments = ProgramArguments(),
) -> int:
    """Compare two runs: choices, precision and ratios of the modules, accuracy with paired intervals."""
    from spike_export.cli.terminal.difference_table import print_difference
    from spike_export.inspection.difference import difference

    found = difference(first, second)
    if as_json:
        print(json.dumps(found.document(), indent=2))
    else:
        print_difference(found, Console())
    return DONE
