"""What a server is told: where it listens, who may ask, and how much."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spike_export.artifacts.errors import EngineError

_SMALLEST_BODY = 1024


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a server; sizes in bytes, times in seconds.

    Attributes:
        model: Name that requests give the model.
        aliases: Further names, for clients whose name of a model cannot be changed; answers give the first.
        api_keys: Keys of which a request has to show one; none for a server that asks for no key.
        rows: Most sequences that are computed together.
        queue: Most sequences that wait for a row.
        prefill_budget: Tokens of prompts that are read between two steps of the sequences in progress.
        prefix_cache: Memory for keys and values of prompts, which later prompts that begin alike need not compute; 0
            for none.
        max_new_tokens: Most tokens of an answer; None for what the context has room for.
        max_body: Largest body of a request.
        timeout: Longest time for the answer to a request.
        drain: Time that running requests get after SIGTERM.
        allowed_origins: Web origins whose pages may ask, `*` for all; none by default.
        engine_process: Whether the runtime computes in a process of its own, so that a crash of native code ends that
            process and not the server.
        engine_idle: Time without processor time within a call, after which that process hangs and is ended. It hangs
            too where a call takes longer than `timeout`: no request can wait for it.
    """

    model: str
    aliases: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    rows: int = 8
    queue: int = 64
    prefill_budget: int = 256
    prefix_cache: int = 256 << 20
    max_new_tokens: int | None = None
    max_body: int = 4 << 20
    timeout: float = 600.0
    drain: float = 30.0
    allowed_origins: tuple[str, ...] = ()
    engine_process: bool = True
    engine_idle: float = 30.0

    def __post_init__(self) -> None:
        checks = (
            ("model", self.model, bool(self.model.strip()), "a name"),
            ("port", self.port, 0 <= self.port < 2**16, "0 to 65535"),
            ("rows", self.rows, 1 <= self.rows <= 1024, "1 to 1024"),
            ("queue", self.queue, self.queue >= 0, "at least 0"),
            ("prefill_budget", self.prefill_budget, self.prefill_budget >= 1, "at least 1"),
            ("prefix_cache", self.prefix_cache, self.prefix_cache >= 0, "at least 0 bytes"),
            (
                "max_new_tokens",
                self.max_new_tokens,
                self.max_new_tokens is None or self.max_new_tokens >= 1,
                "1 or more",
            ),
            ("max_body", self.max_body, self.max_body >= _SMALLEST_BODY, f"at least {_SMALLEST_BODY} bytes"),
            ("timeout", self.timeout, self.timeout > 0, "above 0"),
            ("engine_idle", self.engine_idle, self.engine_idle > 0, "above 0"),
            ("drain", self.drain, self.drain >= 0, "at least 0"),
        )
        for name, value, holds, expected in checks:
            if not holds:
                raise EngineError(f"{name} is {value}; expected {expected}")
        if not all(key.isascii() and key.isprintable() and key.strip() == key and key for key in self.api_keys):
            raise EngineError("an API key is empty or has characters that a header cannot carry; give another one")


def read_keys(given: Sequence[str], file: Path | None) -> tuple[str, ...]:
    """Return API keys, those of the file a line each; lines that are empty or begin with # are left out.

    Raises:
        EngineError: The file cannot be read, or holds no key.
    """
    if file is None:
        return tuple(given)
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise EngineError(f"{file}: cannot read the API keys: {reason}") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise EngineError(f"{file}: there is no API key in this file; write one a line")
    return (*given, *keys)
