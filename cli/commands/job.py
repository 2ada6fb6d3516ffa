"""`spike-export MODEL`: the main job, all stages over a work directory."""

import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.console import Console

from spike_export.cli.arguments import (
    AsJson,
    BuildArguments,
    ClusterArguments,
    CorpusArguments,
    DtypeArguments,
    ExecutionArguments,
    FormatArguments,
    GateArguments,
    GraphArguments,
    Model,
    QuantizationArguments,
    Recompute,
    RunArguments,
    ThreadArguments,
)
from spike_export.cli.invocation import COMMAND
from spike_export.cli.options import (
    build_options,
    cache_options,
    calibration_options,
    cluster_options,
    corpus_options,
    execution_options,
    further_texts,
    use_threads,
)
from spike_export.cli.terminal.documents import job_document
from spike_export.cli.terminal.lines import print_whole
from spike_export.cli.terminal.outcomes import print_build, print_notes
from spike_export.cli.terminal.output import Output
from spike_export.cli.verdicts import accuracy_verdict, plan_verdict

if TYPE_CHECKING:
    from spike_export.pipeline.job import Job
    from spike_export.pipeline.run_job import JobResult


def job(
    model: Model,
    /,
    *,
    out: Annotated[Path, Parameter(help="Engine plan to write; its description goes beside it.")],
    work_dir: Annotated[Path | None, Parameter(help="Folder for all other results (default: OUT.run).")] = None,
    quantize: Annotated[bool, Parameter(help="Quantize; --no-quantize exports the model in 16 or 32 bit.")] = True,
    corpus: CorpusArguments = CorpusArguments(),
    quantization: QuantizationArguments = QuantizationArguments(),
    dtype: DtypeArguments = DtypeArguments(),
    number_format: FormatArguments = FormatArguments(),
    execution: ExecutionArguments = ExecutionArguments(),
    cluster: ClusterArguments = ClusterArguments(),
    graph: GraphArguments = GraphArguments(),
    gate: GateArguments = GateArguments(),
    build: BuildArguments = BuildArguments(),
    threads: ThreadArguments = ThreadArguments(),
    recompute: Recompute = None,
    as_json: AsJson = False,
    run_options: RunArguments = RunArguments(),
) -> int:
    """Run the whole job: calibrate, choose, export, check, build and report."""
    use_threads(threads)
    from spike_export.engines.plan.paths import run_folder
    from spike_export.pipeline.job import Job

    work = Job(
        model=model,
        work_dir=work_dir or run_folder(out),
        plan=out,
        calibration=calibration_options(corpus, quantization, dtype),
        quantize=quantize,
        number_format=number_format.number_format,
        corpus=corpus_options(corpus),
        execution=execution_options(execution),
        cache=cache_options(graph),
        logits=graph.logits,
        limits=gate.limits,
        texts=further_texts(gate, corpus),
        build=build_options(build),
        recompute_recipe=recompute == "recipe",
        cluster=cluster_options(cluster),
        command=COMMAND.get(),
    )
    return _run_job(work, build.allow_fallback, Output(run_options.quiet, as_json), run_options)


def _run_job(work: "Job", allow_fallback: bool, output: Output, options: RunArguments) -> int:
    from spike_export.pipeline.pipeline import stages_of
    from spike_export.pipeline.run_job import run_job

    display = output.display(stages_of(work))
    result = run_job(work, display=display, force=options.force, overwrite=options.overwrite)
    output.result(job_document(result), partial(_print_result, result))
    if result.engine is None:
        return accuracy_verdict(result.check.passed)
    return plan_verdict(result.engine, allow_fallback)


def _print_result(result: "JobResult", console: Console) -> None:
    from spike_export.report.check_table import print_check

    print_check(result.check, console)
    if result.recipe is not None:
        print_notes(result.recipe, console)
    if result.engine is not None:
        print_build(result.engine, console)
    plans = result.engine.plans if result.engine else ("not built: the accuracy limit was missed",)
    places: list[tuple[str, object]] = [*(("plan", plan) for plan in plans), ("bundle", result.bundle)]
    serve = f"spike-export serve {shlex.quote(str(result.bundle))}"
    named = (*places, ("report", result.report), ("serve it", serve))
    print_whole(console, *(f"{name}: {place}" for name, place in named))
