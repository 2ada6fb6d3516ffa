"""The benchmark of a bundle's sessions on a tiny model: every way of opening it runs, and is told on a line."""

import sys
from pathlib import Path

import pytest

from benchmarks.speed import shared_sessions
from spike_export.export.bundle import ExportOptions, export_bundle
from tests.support.tiny.models import tiny_llama


@pytest.mark.usefixtures("denormals_as_before")
def test_every_way_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    export_bundle(tiny_llama(layers=1).checkpoint, None, ExportOptions("float32"), tmp_path / "b")
    monkeypatch.setattr(shared_sessions, "in_own_process", lambda use, *given: use(*given))
    monkeypatch.setattr(sys, "argv", ["shared_sessions", str(tmp_path / "b")])
    assert shared_sessions.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[0].strip() for line in lines] == ["sessions", *shared_sessions.WAYS]
    first, second = shared_sessions._opened_twice(tmp_path / "b", 1, tmp_path)
    assert first is second
    first, second = shared_sessions._two(tmp_path / "b", 1, tmp_path)
    assert first is not second
