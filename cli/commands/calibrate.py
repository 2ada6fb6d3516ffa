"""`spike-export calibrate MODEL`: statistics and recipe."""

from collections import Counter
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.text import Text

from spike_export.cli.arguments import (
    CorpusArguments,
    DtypeArguments,
    ExecutionArguments,
    Model,
    QuantizationArguments,
    RunArguments,
)
from spike_export.cli.exit_codes import DONE
from spike_export.cli.options import calibration_options, corpus_fields, execution_fields
from spike_export.cli.terminal.outcomes import print_notes


def calibrate(
    model: Model,
    /,
    *,
    work_dir: Annotated[Path, Parameter(help="Folder for statistics and recipe.")],
    corpus: CorpusArguments = CorpusArguments(),
    quantization: QuantizationArguments = QuantizationArguments(),
    dtype: DtypeArguments = DtypeArguments(),
    execution: ExecutionArguments = ExecutionArguments(),
    shard: Annotated[
        str | None, Parameter(help="i/n: only measure the i-th of n parts of the windows; `merge` joins the parts.")
    ] = None,
    run_options: RunArguments = RunArguments(),
) -> int:
    """Measure activation spikes, choose prefix, smoothing and modules, and write the recipe."""
    from spike_export.calibration.statistics.partial_statistics import parse_shard, shard_samples
    from spike_export.cli.terminal.progress_display import ProgressDisplay
    from spike_export.pipeline.job import Job
    from spike_export.pipeline.opening import open_pipeline
    from spike_export.pipeline.pipeline import BUNDLE, stages_of

    options = calibration_options(corpus, quantization, dtype)
    part = parse_shard(shard) if shard else None
    if part:
        shard_samples(options.samples, part)  # an empty shard is refused before the model is opened
    work = Job(model, work_dir, calibration=options, shard=part, **corpus_fields(corpus), **execution_fields(execution))
    console = Console()
    stages = stages_of(work)
    display = ProgressDisplay(console, stages[: stages.index(BUNDLE)], quiet=run_options.quiet)
    pipeline = open_pipeline(work, display, force=run_options.force)
    if part:
        with display:
            pipeline.measure()
        if not run_options.quiet:
            console.print(Text(f"statistics of shard {shard}: {work_dir / 'spikes.json'}"), soft_wrap=True)
        return DONE
    with display:
        recipe = pipeline.calibrate()
    if not run_options.quiet:
        prefix = f"prefix {list(recipe.prefix_ids)} {recipe.prefix.text!r}" if recipe.prefix else "no prefix"
        counts: Counter[str] = Counter({recipe.scheme.unquantized: 0})
        counts.update(recipe.modules[name].precision for name in recipe.kept_linears())
        total = len(recipe.modules)
        kept = ", ".join(f"{count} of {total} linears in {precision}" for precision, count in counts.items())
        console.print(Text(f"{kept}, {prefix}\nrecipe: {work_dir / 'recipe.json'}"), soft_wrap=True)
        print_notes(recipe, console)
    return DONE
