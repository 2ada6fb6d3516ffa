"""`spike-export build BUNDLE`: the engine plan."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from spike_export.cli.arguments import AsJson, BuildArguments, Bundle, RunArguments, ThreadArguments
from spike_export.cli.invocation import record
from spike_export.cli.options import build_options, use_threads
from spike_export.cli.terminal.documents import engine_document
from spike_export.cli.terminal.lines import print_lines
from spike_export.cli.terminal.outcomes import print_build
from spike_export.cli.terminal.output import Output
from spike_export.cli.verdicts import plan_verdict


def build(
    bundle: Bundle,
    /,
    *,
    out: Annotated[Path, Parameter(help="Engine plan to write; its description goes beside it.")],
    build: BuildArguments = BuildArguments(),
    threads: ThreadArguments = ThreadArguments(),
    as_json: AsJson = False,
    run_options: RunArguments = RunArguments(),
) -> int:
    """Build the engine plan of a bundle, and read from the plan in which precision each module runs."""
    use_threads(threads)
    from spike_export.pipeline.build import build as build_engine

    output = Output(run_options.quiet, as_json)
    with output.progress("plan") as progress:
        engine = build_engine(
            bundle,
            out,
            build_options(build),
            progress=progress,
            force=run_options.force,
            overwrite=run_options.overwrite,
        )

    record(bundle.absolute().parent)

    def show(console: Console) -> None:
        print_build(engine, console)
        plans = zip(engine.plans, engine.sidecars, strict=True)
        print_lines(console, *(f"plan: {plan} ({sidecar.backend.reason})" for plan, sidecar in plans))

    output.result(engine_document(engine), show)
    return plan_verdict(engine, build.allow_fallback)
