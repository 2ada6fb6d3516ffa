"""`spike-export bench URL|BUNDLE`: how a server holds under load."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from rich.console import Console

from spike_export.artifacts.errors import EngineError
from spike_export.cli.arguments import AsJson, LoadArguments, ProgramArguments, ThreadArguments, values
from spike_export.cli.commands.serve import require_extra
from spike_export.cli.exit_codes import DONE
from spike_export.cli.options import use_threads
from spike_export.cli.terminal.output import Output
from spike_export.cli.terminal.text_table import print_table

if TYPE_CHECKING:
    from spike_export.serving.load import Report


def bench(
    target: Annotated[str, Parameter(name="URL|BUNDLE", help="Address of a server, or a bundle to serve meanwhile.")],
    /,
    *,
    concurrency: Annotated[
        tuple[int, ...], Parameter(negative="", help="Clients at once; repeat the option for several (default: 1, 8).")
    ] = (1, 8),
    load: LoadArguments = LoadArguments(),
    generator: Annotated[
        Literal["own", "guidellm"],
        Parameter(help="Who sends the requests: this program, or guidellm where that program is installed."),
    ] = "own",
    model: Annotated[
        str | None, Parameter(name="--model-name", help="Name of the model (default: the server's first)")
    ] = None,
    api_key: Annotated[str | None, Parameter(help="Key to show to the server.")] = None,
    threads: ThreadArguments = ThreadArguments(),
    as_json: AsJson = False,
    run_options: ProgramArguments = ProgramArguments(),
) -> int:
    """Measure a server of OpenAI's API: tokens per second, time to first token, time per token."""
    require_extra()
    use_threads(threads)
    from spike_export.serving.guidellm import run_guidellm
    from spike_export.serving.load import Load, run_load

    measured = run_guidellm if generator == "guidellm" else run_load
    loads = [Load(concurrency=clients, **values(load)) for clients in concurrency]
    with _address(target, max(concurrency), threads.threads) as url:
        reports = [measured(url, each, model=model, api_key=api_key) for each in loads]
    found = [report.as_json() for report in reports]
    Output(as_json=as_json).result(found, partial(_print_table, found))
    for report in reports:
        _require_answers(report)
    return DONE


@contextmanager
def _address(target: str, clients: int, threads: int | None) -> Iterator[str]:
    """Give the address of a server; of a bundle's own one until the block ends."""
    if target.startswith(("http://", "https://")):
        yield target
        return
    from spike_export.engines.runtime_choice import RuntimeChoice
    from spike_export.serving.server import served_meanwhile
    from spike_export.serving.service import open_service
    from spike_export.serving.settings import Settings

    settings = Settings(model=Path(target).resolve().name, port=0, rows=clients, prefix_cache=0)
    service = open_service(RuntimeChoice.of(target, threads=threads), settings, lambda *_: None)
    with served_meanwhile(service) as url:
        yield url


def _print_table(found: list[dict[str, Any]], console: Console) -> None:
    rows = [
        (
            str(figures["concurrency"]),
            str(figures["requests"]),
            f"{figures['tokens_per_second']:.1f}",
            _milliseconds(figures["time_to_first_token"]),
            _milliseconds(figures["time_per_token"]),
        )
        for figures in found
    ]
    columns = ("clients", "requests", "tokens/s", "first token, ms", "per token, ms")
    print_table(console, "Load; times are p50 / p90 / p99", columns, rows)


def _milliseconds(times: dict[str, float | None]) -> str:
    """Return times with four digits, so that a row fits into 80 columns."""
    return " / ".join("-" if value is None else f"{value * 1e3:.4g}" for value in times.values())


def _require_answers(report: "Report") -> None:
    """Refuse figures of a load of which a part was not answered.

    Raises:
        EngineError: Says how many, and the first reason.
    """
    errors = [request.error for request in report.requests if request.error is not None]
    if errors:
        raise EngineError(
            f"{len(errors)} of {len(report.requests)} requests of {report.load.concurrency} clients failed: "
            f"{errors[0]}; see the server's log"
        )
