"""`spike-export build BUNDLE`: the engine plan."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.text import Text

from spike_export.cli.arguments import BuildArguments, Bundle, RunArguments, ThreadArguments
from spike_export.cli.options import build_options, use_threads
from spike_export.cli.terminal.outcomes import print_build
from spike_export.cli.verdicts import plan_verdict


def build(
    bundle: Bundle,
    /,
    *,
    out: Annotated[Path, Parameter(help="Engine plan to write; its description goes beside it.")],
    build: BuildArguments = BuildArguments(),
    threads: ThreadArguments = ThreadArguments(),
    run_options: RunArguments = RunArguments(),
) -> int:
    """Build the engine plan of a bundle, and read from the plan in which precision each module runs."""
    use_threads(threads)
    from spike_export.cli.terminal.progress_display import ProgressDisplay
    from spike_export.pipeline.build import build as build_engine

    console = Console()
    with ProgressDisplay(console, ["plan"], quiet=run_options.quiet) as display, display.stage("plan") as progress:
        engine = build_engine(
            bundle,
            out,
            build_options(build),
            progress=progress,
            force=run_options.force,
            overwrite=run_options.overwrite,
        )
    if not run_options.quiet:
        print_build(engine, console)
        for plan, sidecar in zip(engine.plans, engine.sidecars, strict=True):
            console.print(Text(f"plan: {plan} ({sidecar.backend.reason})"), soft_wrap=True)
    return plan_verdict(engine, build.allow_fallback)
