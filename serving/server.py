"""The process that listens: a socket, uvicorn, signals, and lines of JSON."""

import json
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from spike_export.artifacts.errors import EngineError
from spike_export.serving.app import create_app
from spike_export.serving.service import Service
from spike_export.serving.settings import Settings


def log_line(event: str, fields: dict[str, object]) -> None:
    """Write an event as one line of JSON to standard error."""
    entry = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": event, **fields}
    print(json.dumps(entry), file=sys.stderr, flush=True)


def listen(settings: Settings) -> socket.socket:
    """Return a socket that listens; port 0 stands for any that is free.

    Raises:
        EngineError: The address cannot be had.
    """
    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise EngineError(
            f"cannot listen on {settings.host} port {settings.port}: {reason}; give another --host or --port"
        ) from error


class Server(uvicorn.Server):
    """uvicorn, which ends with exit code 0 when a signal has asked it to: that is how a service is stopped."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGTERM and SIGINT: finish what runs, within a time; a second signal ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {name: signal.signal(name, self.handle_exit) for name in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """See `uvicorn.Server`."""
        self.force_exit = self.should_exit
        self.should_exit = True


def make_server(service: Service) -> Server:
    """Return a server over a service; `run(sockets=[...])` serves until a signal or `should_exit`."""
    config = uvicorn.Config(
        create_app(service),
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(service.settings.drain)),
    )
    return Server(config)


def serve(service: Service, on_start: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT, then finish what runs.

    Args:
        service: What to serve.
        on_start: Told the server's address once it listens.

    Raises:
        EngineError: The address cannot be had.
    """
    with listen(service.settings) as place:
        host = f"[{service.settings.host}]" if ":" in service.settings.host else service.settings.host
        on_start(f"http://{host}:{place.getsockname()[1]}")
        with _errors_logged(service):
            make_server(service).run(sockets=[place])


@contextmanager
def served_meanwhile(service: Service) -> Iterator[str]:
    """Serve on a thread until the block ends; give the server's address."""
    server = make_server(service)
    with listen(service.settings) as place, _errors_logged(service):
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True)
        thread.start()
        try:
            yield f"http://{service.settings.host}:{place.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def _errors_logged(service: Service) -> Iterator[None]:
    """Let uvicorn's errors go into the service's log until the block ends."""
    logger, handler = logging.getLogger("uvicorn.error"), _JsonHandler(service)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _JsonHandler(logging.Handler):
    """Writes uvicorn's errors, tracebacks included, as the other lines are written."""

    def __init__(self, service: Service) -> None:
        super().__init__(logging.ERROR)
        self._log = service.log

    def emit(self, record: logging.LogRecord) -> None:
        trace = None if record.exc_info is None else logging.Formatter().formatException(record.exc_info)
        self._log("error", {"message": record.getMessage(), "traceback": trace})
