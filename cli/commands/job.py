"""`spike-export MODEL`: the main job, all stages over a work directory."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.text import Text

from spike_export.cli.arguments import (
    BuildArguments,
    CorpusArguments,
    DtypeArguments,
    ExecutionArguments,
    FormatArguments,
    GateArguments,
    GraphArguments,
    Model,
    QuantizationArguments,
    RunArguments,
)
from spike_export.cli.options import (
    build_options,
    cache_options,
    calibration_options,
    corpus_fields,
    execution_fields,
)
from spike_export.cli.terminal.outcomes import print_build, print_notes
from spike_export.cli.verdicts import accuracy_verdict, plan_verdict

if TYPE_CHECKING:
    from spike_export.pipeline.job import Job


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
    graph: GraphArguments = GraphArguments(),
    gate: GateArguments = GateArguments(),
    build: BuildArguments = BuildArguments(),
    run_options: RunArguments = RunArguments(),
) -> int:
    """Run the whole job: calibrate, choose, export, check, build and report."""
    from spike_export.pipeline.job import Job

    work = Job(
        model=model,
        work_dir=work_dir or out.parent / f"{out.name}.run",
        plan=out,
        calibration=calibration_options(corpus, quantization, dtype),
        quantize=quantize,
        number_format=number_format.number_format,
        **corpus_fields(corpus),
        cache=cache_options(graph),
        logits=graph.logits,
        max_ppl_increase=gate.max_ppl_increase,
        build=build_options(build),
        allow_fallback=build.allow_fallback,
        **execution_fields(execution),
    )
    return _run_job(work, run_options)


def _run_job(work: "Job", options: RunArguments) -> int:
    from spike_export.cli.terminal.progress_display import ProgressDisplay
    from spike_export.pipeline.opening import open_pipeline
    from spike_export.pipeline.pipeline import stages_of
    from spike_export.report.check_table import print_check

    console = Console()
    display = ProgressDisplay(console, stages_of(work), quiet=options.quiet)
    pipeline = open_pipeline(work, display, force=options.force)
    with display:
        recipe = pipeline.calibrate() if work.quantize else None
        bundle = pipeline.export(recipe)
        check = pipeline.check(recipe, bundle)
        engine = pipeline.build(bundle) if check.passed else None
        report = pipeline.report(built=check.passed)
    if not options.quiet:
        print_check(check, console)
        if recipe is not None:
            print_notes(recipe, console)
        if engine is not None:
            print_build(engine, console)
        plans = engine.plans if engine else ("not built: the accuracy limit was missed",)
        for name, place in (*(("plan", plan) for plan in plans), ("bundle", bundle), ("report", report)):
            console.print(Text(f"{name}: {place}"), soft_wrap=True)
    if engine is None:
        return accuracy_verdict(check.passed)
    return plan_verdict(engine, work.allow_fallback)
