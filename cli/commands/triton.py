"""`spike-export triton BUNDLE|PLAN`: a model repository for NVIDIA Triton."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from spike_export.cli.arguments import AsJson, ProgramArguments, ThreadArguments, TritonArguments, values
from spike_export.cli.commands.serve import require_extra
from spike_export.cli.exit_codes import DONE
from spike_export.cli.terminal.messages import say
from spike_export.cli.terminal.output import Output


def triton(
    path: Annotated[Path, Parameter(name="BUNDLE|PLAN", help="Folder that export wrote, or an engine plan.")],
    /,
    *,
    out: Annotated[Path, Parameter(help="Model repository; other models in it stay.")],
    model: Annotated[
        str | None,
        Parameter(name="--model-name", help="Name of the model (default: of the bundle's folder or the plan's file)."),
    ] = None,
    limits: TritonArguments = TritonArguments(),
    threads: ThreadArguments = ThreadArguments(),
    bundle: Annotated[
        Path | None,
        Parameter(help="Bundle that the plan was built from (default: PLAN.run/bundle, where the main job writes it)."),
    ] = None,
    overwrite: Annotated[
        bool, Parameter(negative="", help="Replace also a model that spike-export did not write.")
    ] = False,
    as_json: AsJson = False,
    run_options: ProgramArguments = ProgramArguments(),
) -> int:
    """Write a bundle or a plan as a model of NVIDIA Triton's Python backend; extra `serve`."""
    require_extra()
    from spike_export.serving.triton.model_settings import ModelSettings
    from spike_export.serving.triton.repository import write_repository

    name = model or path.resolve().stem
    given = {key: value for key, value in values(limits).items() if value is not None}
    settings = ModelSettings(threads=threads.threads or 0, **given)
    settings.service(name)  # refuses what a server would refuse
    written = write_repository(path, out, name, settings, bundle=bundle, overwrite=overwrite)
    Output(as_json=as_json).result({"model": str(written), "name": name}, lambda _: say(f"model: {written}"))
    return DONE
