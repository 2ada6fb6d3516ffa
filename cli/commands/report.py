"""`spike-export report RUN`: the HTML page."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.text import Text

from spike_export.cli.arguments import RunArguments
from spike_export.cli.exit_codes import DONE


def report(
    run_directory: Annotated[Path, Parameter(help="Work directory of a run.")],
    /,
    *,
    engine: Annotated[
        Path | None, Parameter(help="engine.json of the plan, if it lies outside the work directory.")
    ] = None,
    run_options: RunArguments = RunArguments(),
) -> int:
    """Write the HTML page of a run."""
    from spike_export.report.page import write_report

    page = write_report(run_directory, engine=engine)
    if not run_options.quiet:
        Console().print(Text(f"report: {page}"), soft_wrap=True)
    return DONE
