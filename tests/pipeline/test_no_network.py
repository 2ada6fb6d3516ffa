"""No command uses the network unless a hub id is given."""

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny.cli_models import call, write_inputs

pytestmark = pytest.mark.usefixtures("one_thread", "blank_pictures")

_watching: list[list[str]] = []
"""The list that events go to, while one is watched: an audit hook cannot be removed."""


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    reaches_out = event in ("socket.connect", "socket.sendto", "socket.bind", "socket.getaddrinfo")
    if _watching and reaches_out and not isinstance(arguments[-1], str | bytes):  # a path: a process of our own
        _watching[-1].append(f"{event} {arguments[-1]!r}")


sys.addaudithook(_hook)


@contextmanager
def watched() -> Iterator[list[str]]:
    """Yield a list of what sockets are used for in this process during the block."""
    _watching.append([])
    try:
        yield _watching[-1]
    finally:
        _watching.pop()


def test_no_command_opens_a_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    write_inputs(tmp_path)
    model, run, bundle = tmp_path / "model", tmp_path / "run", tmp_path / "bundle"
    corpus = ("--corpus", tmp_path / "corpus.txt", "--samples", "2", "--length", "16")
    commands: tuple[tuple[str | Path, ...], ...] = (
        ("calibrate", model, "--work-dir", run, "--dtype", "float32", *corpus),
        ("export", model, "--recipe", run / "recipe.json", "--out", bundle),
        ("check", bundle, "--reference", model, *corpus),
        ("generate", bundle, "--prompt", "a b", "--max-new-tokens", "2"),
        ("inspect", run),
        ("report", run),
    )
    with watched() as sockets:
        for command in commands:
            done = call(*command)
            assert done.code == 0, done.err
    assert sockets == []


def test_the_hook_sees_a_connection() -> None:
    with watched() as sockets, socket.socket() as each, pytest.raises(OSError, match="refused"):
        each.connect(("127.0.0.1", 9))
    assert sockets == ["socket.connect ('127.0.0.1', 9)"]
