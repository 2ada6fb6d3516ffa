"""`spike-export serve` as a process: where it listens, what it answers, and how SIGTERM ends it."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

import httpx2

from tests.support.documentation import examples
from tests.support.tiny.cli_models import call
from tests.support.tiny.service import write_served_bundle

PROGRAM = [sys.executable, "-c", "from spike_export.cli.main import main; main()"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_served_bundle(tmp_path_factory.mktemp("served"))


@contextmanager
def served(bundle: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [*PROGRAM, "serve", str(bundle), "--port", "0", "--threads", "1", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    try:
        assert process.stderr is not None
        address = next((found[0] for line in process.stderr if (found := re.search(r"http://\S+", line))), None)
        assert address, "the server does not say where it listens"
        yield process, address
    finally:
        process.kill()
        process.wait()


def documented_request(page: str) -> tuple[str, dict[str, object]]:
    """Return path and body of the page's `curl` command."""
    (words,) = (words for example in examples(page) for words in example.commands if words[0] == "curl")
    body: dict[str, object] = json.loads(words[words.index("-d") + 1])
    return words[1].removeprefix("http://127.0.0.1:8000"), body


def test_requests_that_run_are_finished_on_sigterm(bundle: Path) -> None:
    with served(bundle, "--api-key", "k1", "--api-key", "k2") as (process, url):
        body = {"prompt": "a", "max_tokens": 60, "ignore_eos": True, "stream": True, "logprobs": 0}
        assert httpx2.post(f"{url}/v1/completions", json=body).status_code == 401
        headers = {"authorization": "Bearer k2"}
        for page in ("README.md", "docs/serving.md"):
            path, shown = documented_request(page)
            assert httpx2.post(url + path, json=shown | {"model": None}, headers=headers, timeout=60).status_code == 200
        with httpx2.stream("POST", f"{url}/v1/completions", json=body, headers=headers, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            events = [line for line in lines if line]
        assert events[-1] == "data: [DONE]"
        assert len(events) > 55
        assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--port", "99999"), "port is 99999; expected 0 to 65535"),
        (("--rows", "0"), "rows is 0; expected 1 to 1024"),
        (("--api-key", ""), "an API key is empty"),
        (("--api-key-file", "nothing.txt"), "nothing.txt: cannot read the API keys"),
        (("--host", "no.such.host.invalid"), "cannot listen on no.such.host.invalid"),
    ],
)
def test_what_cannot_be_served_is_one_line(
    bundle: Path, options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in call("serve", bundle, "--threads", "1", "--no-engine-process", *options).error
