"""`spike-export report RUN`: the HTML page."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from spike_export.cli.arguments import AsJson, RunArguments
from spike_export.cli.exit_codes import DONE
from spike_export.cli.terminal.lines import print_lines
from spike_export.cli.terminal.output import Output


def report(
    run_directory: Annotated[Path, Parameter(help="Work directory of a run.")],
    /,
    *,
    engine: Annotated[
        Path | None, Parameter(help="engine.json of the plan, if it lies outside the work directory.")
    ] = None,
    as_json: AsJson = False,
    run_options: RunArguments = RunArguments(),
) -> int:
    """Write the HTML page of a run."""
    from spike_export.report.page import PICTURE_FOLDER, write_report

    page = write_report(run_directory, engine=engine)
    document = {"report": str(page), "pictures": str(page.parent / PICTURE_FOLDER)}
    Output(run_options.quiet, as_json).result(document, lambda console: print_lines(console, f"report: {page}"))
    return DONE
