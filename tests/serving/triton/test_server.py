"""The model in a real Triton server: `TRITONSERVER=COMMAND pytest --slow tests/serving/triton/test_server.py`.

COMMAND starts a Triton server whose Python has spike-export, as docs/triton.md tells.
"""

import asyncio
import json
import os
import shlex
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from benchmarks.speed.triton import measured, request_of, streamed
from spike_export import Engine
from spike_export.serving.load import Load
from spike_export.serving.triton.model_settings import ModelSettings
from spike_export.serving.triton.repository import write_repository
from tests.serving.triton.test_python_model import frontend_inputs
from tests.support.tiny.service import CAPACITY, write_served_bundle

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("TRITONSERVER" not in os.environ, reason="needs a Triton server: TRITONSERVER=COMMAND"),
]

GREEDY = {"temperature": 0, "max_tokens": 12}
LONG = {"temperature": 0, "max_tokens": CAPACITY - 20, "ignore_eos": True}


@dataclass(frozen=True)
class Triton:
    """A server that runs, with a model `tiny` of three rows and a model `single` of one row and no queue."""

    http: str
    grpc: str
    expected: str

    def post(self, path: str, body: dict[str, Any]) -> httpx2.Response:
        return httpx2.post(f"{self.http}/v2/models/{path}", json=body, timeout=60)


def free_ports(count: int) -> list[int]:
    places = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [place.getsockname()[1] for place in places]
    for place in places:
        place.close()
    return ports


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    pytest.importorskip("tritonclient.grpc", reason="needs tritonclient[grpc]")
    place = tmp_path_factory.mktemp("triton")
    bundle, repository = write_served_bundle(place), place / "repository"
    write_repository(bundle, repository, "tiny", ModelSettings(threads=1, rows=3, queue=16))
    write_repository(bundle, repository, "single", ModelSettings(threads=1, rows=1, queue=0))
    with Engine.open(bundle) as engine:
        expected = engine.generate("ab cd", max_new_tokens=12, do_sample=False)[0].text
    ports = dict(zip(("http", "grpc", "metrics"), free_ports(3), strict=True))
    options = [f"--{name}-port={port}" for name, port in ports.items()]
    addresses = [f"--{name}-address=127.0.0.1" for name in ("http", "grpc")]
    command = [*shlex.split(os.environ["TRITONSERVER"]), f"--model-repository={repository}", *options, *addresses]
    with (place / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{ports['http']}"
        wait_until_ready(url, server, place / "log")
        yield Triton(url, f"127.0.0.1:{ports['grpc']}", expected)
    finally:
        server.terminate()
        assert server.wait(40) == 0


def wait_until_ready(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            if httpx2.get(f"{url}/v2/health/ready", timeout=5).status_code == 200:
                return
        except httpx2.HTTPError:
            pass
        time.sleep(0.1)
    raise AssertionError(log.read_text()[-3000:])


async def texts(triton: Triton, model: str, parameters: dict[str, Any], most: int | None = None) -> list[str]:
    from tritonclient.grpc.aio import InferenceServerClient

    found = []
    async with InferenceServerClient(triton.grpc) as client:
        async for result in streamed(client, request_of(model, "ab cd", parameters, stream=True)):
            found.append(result.as_numpy("text_output")[0].decode())
            if len(found) == most:
                break
    return found


def test_a_grpc_stream_has_the_engines_text_in_pieces(triton: Triton) -> None:
    pieces = asyncio.run(texts(triton, "tiny", GREEDY))
    assert len(pieces) > 3
    assert "".join(pieces) == triton.expected


def test_both_ends_of_the_generate_extension(triton: Triton) -> None:
    whole = triton.post("tiny/generate", {"text_input": "ab cd", "exclude_input_in_output": True, **GREEDY})
    assert whole.json()["text_output"] == triton.expected
    stream = triton.post("tiny/generate_stream", {"text_input": "ab cd", "stream": True, **GREEDY})
    events = [line.removeprefix("data: ") for line in stream.text.splitlines() if line.startswith("data: ")]
    assert len(events) > 3
    assert "".join(json.loads(event)["text_output"] for event in events) == triton.expected


def test_what_the_openai_frontend_sends_is_answered_in_one_response(triton: Triton) -> None:
    """With a final response that may be empty: the frontend takes two at most."""
    flags = frontend_inputs("ab cd")
    parameters, text = json.loads(flags.pop("sampling_parameters")), flags.pop("text_input")

    async def answers() -> list[Any]:
        from tritonclient.grpc.aio import InferenceServerClient

        async with InferenceServerClient(triton.grpc) as client:
            return [each async for each in streamed(client, request_of("tiny", text, parameters, **flags))]

    found = asyncio.run(answers())
    assert len(found) <= 2
    assert found[0].as_numpy("text_output").tolist() == [triton.expected.encode()]
    assert [found[0].as_numpy(f"num_{kind}_tokens").tolist() for kind in ("input", "output")] == [[5], [12]]


def test_a_bad_request_is_refused_and_the_model_goes_on(triton: Triton) -> None:
    refused = triton.post("tiny/generate", {"text_input": "ab", "max_tokens": CAPACITY + 9})
    assert refused.status_code == 400
    assert "tokens" in refused.json()["error"]
    assert "".join(asyncio.run(texts(triton, "tiny", GREEDY))) == triton.expected


def test_many_clients_get_all_their_tokens(triton: Triton) -> None:
    load = Load(requests=48, concurrency=16, prompt_words=6, new_tokens=24, spread=0.5)
    report = asyncio.run(measured(triton.grpc, "tiny", load))
    assert [request.error for request in report.requests] == [None] * 48
    assert sum(request.tokens for request in report.requests) == sum(tokens for _, tokens in load.calls())


def test_a_client_that_leaves_frees_the_row(triton: Triton) -> None:
    """A model of one row refuses a second request, until the first one's client has left."""

    async def answers() -> tuple[list[str], str]:
        first = await texts(triton, "single", LONG, most=2)
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            answer = await asyncio.to_thread(triton.post, "single/generate", {"text_input": "ab cd", **GREEDY})
            if answer.status_code == 200:
                return first, answer.json()["text_output"]
            assert "try again" in answer.json()["error"]
        raise AssertionError("the row is still taken after 5 s")

    pieces, after = asyncio.run(answers())
    assert len(pieces) == 2
    assert after.removeprefix("ab cd") == triton.expected
