"""`spike-export serve BUNDLE|PLAN`: a model as a service in OpenAI's terms."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from spike_export.artifacts.errors import EngineError
from spike_export.cli.arguments import (
    LoweringArguments,
    ProgramArguments,
    RuntimeArguments,
    ServerArguments,
    ThreadArguments,
    values,
)
from spike_export.cli.commands.generate import runtime_options
from spike_export.cli.exit_codes import DONE
from spike_export.cli.options import use_threads
from spike_export.cli.terminal.messages import say

_EXTRA = ("fastapi", "uvicorn", "prometheus_client", "llguidance")


def serve(
    path: Annotated[
        Path,
        Parameter(name="BUNDLE|PLAN", help="Folder that export wrote, or an engine plan; best with --kv-cache static."),
    ],
    /,
    *,
    server: ServerArguments = ServerArguments(),
    provider: Annotated[
        Literal["cpu", "cuda"] | None, Parameter(help="Device on which ONNX Runtime computes (default: cpu).")
    ] = None,
    threads: ThreadArguments = ThreadArguments(),
    lowering: LoweringArguments = LoweringArguments(),
    sample_clipping: Annotated[
        float,
        Parameter(
            help="Share of ONNX Runtime's calls, such as 0.01, that count activations beyond the range of their static "
            "scale, for /metrics; over a static cache (default: 0, none)."
        ),
    ] = 0.0,
    bundle: Annotated[
        Path | None,
        Parameter(help="Bundle that the plan was built from (default: PLAN.run/bundle, where the main job writes it)."),
    ] = None,
    runtime: RuntimeArguments = RuntimeArguments(),
    run_options: ProgramArguments = ProgramArguments(),
) -> int:
    """Serve a bundle or a plan over HTTP with OpenAI's endpoints, until SIGTERM or Ctrl-C; extra `serve`."""
    require_extra()
    use_threads(threads)
    from spike_export.engines.runtime_choice import RuntimeChoice
    from spike_export.serving.server import log_line
    from spike_export.serving.server import serve as serve_until_told
    from spike_export.serving.service import open_service
    from spike_export.serving.settings import Settings, read_keys

    given = {name: value for name, value in values(server).items() if value is not None}
    keys = read_keys(given.pop("api_key"), given.pop("api_key_file", None))
    given.setdefault("model", path.resolve().name)
    lists = {"aliases": given.pop("alias"), "allowed_origins": given.pop("allow_origin")}
    settings = Settings(api_keys=keys, **lists, **given)
    choice = RuntimeChoice.of(
        path,
        threads=threads.threads,
        provider=provider,
        lowering=lowering.lowering,
        weights_copy=lowering.weights_copy,
        bundle=bundle,
        runtime=runtime_options(runtime),
        sample_clipping=sample_clipping,
    )
    service = open_service(choice, settings, log_line)
    if service.model.manifest.kv_cache == "dynamic":
        say("note: a bundle with a growing cache computes one sequence at a time; export it with --kv-cache static")
    if service.limits.rows < settings.rows:
        say(f"note: the plan computes {service.limits.rows} sequences at a time; build it with a larger --max-batch")
    serve_until_told(service, lambda address: say(f"serving {settings.model} on {address}"))
    return DONE


def require_extra() -> None:
    """Refuse to serve without the packages of the extra.

    Raises:
        EngineError: Names the package that is missing.
    """
    from importlib.util import find_spec

    for name in _EXTRA:
        if find_spec(name) is None:
            raise EngineError(f"serving needs the package {name}; install the extra: pip install 'spike-export[serve]'")
