"""`spike-export calibrate MODEL`: statistics and recipe."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.console import Console

from spike_export.artifacts.errors import RecipeError
from spike_export.cli.arguments import (
    AsJson,
    ClusterArguments,
    CorpusArguments,
    DtypeArguments,
    ExecutionArguments,
    Model,
    QuantizationArguments,
    Recompute,
    RunArguments,
    ThreadArguments,
)
from spike_export.cli.exit_codes import DONE
from spike_export.cli.invocation import record
from spike_export.cli.options import (
    calibration_options,
    cluster_options,
    corpus_options,
    execution_options,
    use_threads,
)
from spike_export.cli.terminal.documents import recipe_document
from spike_export.cli.terminal.lines import print_lines
from spike_export.cli.terminal.outcomes import print_notes
from spike_export.cli.terminal.output import Output

if TYPE_CHECKING:
    from spike_export.calibration.corpus.files import CorpusOptions
    from spike_export.calibration.methods.options import CalibrationOptions
    from spike_export.pipeline.execution import ExecutionOptions


def calibrate(
    model: Model,
    /,
    *,
    work_dir: Annotated[Path, Parameter(help="Folder for statistics and recipe.")],
    corpus: CorpusArguments = CorpusArguments(),
    quantization: QuantizationArguments = QuantizationArguments(),
    dtype: DtypeArguments = DtypeArguments(),
    execution: ExecutionArguments = ExecutionArguments(),
    cluster: ClusterArguments = ClusterArguments(),
    shard: Annotated[
        str | None, Parameter(help="i/n: only measure the i-th of n parts of the windows; `merge` joins the parts.")
    ] = None,
    attribution_windows: Annotated[
        int,
        Parameter(
            help="Windows on which to measure how much of the divergence each input's quantization causes, for "
            "`inspect` to show; a window costs about one forward pass per input (default: none)."
        ),
    ] = 0,
    threads: ThreadArguments = ThreadArguments(),
    recompute: Recompute = None,
    as_json: AsJson = False,
    run_options: RunArguments = RunArguments(),
) -> int:
    """Measure activation spikes, choose prefix, smoothing and modules, and write the recipe."""
    use_threads(threads)
    from spike_export.pipeline.calibrate import calibrate as calibrate_model
    from spike_export.pipeline.pipeline import calibration_stages

    options = calibration_options(corpus, quantization, dtype)
    text, how = corpus_options(corpus), execution_options(execution)
    output = Output(run_options.quiet, as_json)
    spread = cluster_options(cluster)
    if shard is not None:
        if spread is not None:
            raise RecipeError("--shard and --ray divide the same windows; give one")
        return _measure_shard(model, work_dir, shard, options, text, how, output, run_options)
    stages = calibration_stages(options, text, attributed=attribution_windows > 0)
    recipe = calibrate_model(
        model,
        work_dir,
        options,
        corpus=text,
        execution=how,
        cluster=spread,
        display=output.display(stages),
        recompute_recipe=recompute == "recipe",
        attribution_windows=attribution_windows,
        force=run_options.force,
        overwrite=run_options.overwrite,
    ).recipe
    record(work_dir)
    path = work_dir / "recipe.json"

    def show(console: Console) -> None:
        prefix = f"prefix {list(recipe.prefix_ids)} {recipe.prefix.text!r}" if recipe.prefix else "no prefix"
        counts: Counter[str] = Counter({recipe.scheme.unquantized: 0})
        counts.update(recipe.modules[name].precision for name in recipe.kept_linears())
        total = len(recipe.modules)
        kept = ", ".join(f"{count} of {total} linears in {precision}" for precision, count in counts.items())
        chosen = f"{kept}, {prefix}, activations {recipe.activations()}"
        print_lines(console, chosen, f"recipe: {path}")
        print_notes(recipe, console)

    output.result(recipe_document(recipe, str(path)), show)
    return DONE


def _measure_shard(
    model: str,
    work_dir: Path,
    shard: str,
    options: "CalibrationOptions",
    corpus: "CorpusOptions",
    execution: "ExecutionOptions",
    output: Output,
    run_options: RunArguments,
) -> int:
    from spike_export.calibration.statistics.partial_statistics import parse_shard
    from spike_export.pipeline.calibrate import measure_shard
    from spike_export.pipeline.pipeline import SPIKES, calibration_stages

    stages = calibration_stages(options, corpus)
    statistics = measure_shard(
        model,
        work_dir,
        parse_shard(shard),
        options,
        corpus=corpus,
        execution=execution,
        display=output.display(stages[: stages.index(SPIKES) + 1]),
        force=run_options.force,
        overwrite=run_options.overwrite,
    )
    record(work_dir)
    document = {"statistics": str(statistics), "shard": shard}
    output.result(document, lambda console: print_lines(console, f"statistics of shard {shard}: {statistics}"))
    return DONE
