"""`spike-export revalidate RUN MODEL`: whether an old recipe still fits a checkpoint that was trained further."""

from functools import partial
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from spike_export.cli.arguments import AsJson, CorpusArguments, GateArguments, Model, RunArguments, ThreadArguments
from spike_export.cli.exit_codes import DONE, GATE_MISSED
from spike_export.cli.options import evaluation_text, use_threads
from spike_export.cli.terminal.output import Output


def revalidate(
    run: Annotated[Path, Parameter(help="Work directory of the run that made the recipe.")],
    model: Model,
    /,
    *,
    as_json: AsJson = False,
    corpus: CorpusArguments = CorpusArguments(),
    threads: ThreadArguments = ThreadArguments(),
    run_options: RunArguments = RunArguments(),
) -> int:
    """Name the modules of another checkpoint of the same architecture that an old recipe does not fit any more."""
    use_threads(threads)
    from spike_export.cli.terminal.revalidation_table import print_revalidation
    from spike_export.pipeline.revalidate import revalidate as revalidate_run

    text, output = evaluation_text(corpus, GateArguments()), Output(run_options.quiet, as_json)
    with output.progress("revalidate") as progress:
        found = revalidate_run(run, model, text, progress=progress)
    output.result(found.document(), partial(print_revalidation, found))
    return DONE if found.passed else GATE_MISSED
