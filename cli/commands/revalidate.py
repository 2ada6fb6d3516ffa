"""`spike-export revalidate RUN MODEL`: whether an old recipe still fits a checkpoint that was trained further."""

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from spike_export.cli.arguments import CorpusArguments, GateArguments, Model, RunArguments, ThreadArguments
from spike_export.cli.exit_codes import DONE, GATE_MISSED
from spike_export.cli.options import evaluation_text, use_threads


def revalidate(
    run: Annotated[Path, Parameter(help="Work directory of the run that made the recipe.")],
    model: Model,
    /,
    *,
    as_json: Annotated[bool, Parameter(name="--json", negative="", help="Print JSON instead of tables.")] = False,
    corpus: CorpusArguments = CorpusArguments(),
    threads: ThreadArguments = ThreadArguments(),
    run_options: RunArguments = RunArguments(),
) -> int:
    """Name the modules of another checkpoint of the same architecture that an old recipe does not fit any more."""
    use_threads(threads)
    from spike_export.cli.terminal.progress_display import ProgressDisplay
    from spike_export.cli.terminal.revalidation_table import print_revalidation
    from spike_export.pipeline.revalidate import revalidate as revalidate_run

    console, text = Console(), evaluation_text(corpus, GateArguments())
    quiet = run_options.quiet or as_json
    with ProgressDisplay(console, ["revalidate"], quiet=quiet) as display, display.stage("revalidate") as progress:
        found = revalidate_run(run, model, text, progress=progress)
    if as_json:
        print(json.dumps(found.document(), indent=2))
    elif not run_options.quiet:
        print_revalidation(found, console)
    return DONE if found.passed else GATE_MISSED
