"""Keys, limits, clients that leave, failures of the engine: the status of each, and nothing is left behind."""

import json
import shutil
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from spike_export.artifacts.errors import EngineError
from spike_export.engines.generation.sampling import Sampler
from spike_export.engines.onnx_runtime.decoding import OnnxDecoding
from spike_export.engines.onnx_runtime.slots import StaticSlots
from spike_export.serving.openai import exchange
from tests.support.tiny.service import Running, running

LONG = {"prompt": "a", "max_tokens": 150, "ignore_eos": True}


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def small(bundle: Path) -> Iterator[Running]:
    """One row, one place in the queue, two keys, small bodies."""
    with running(bundle, rows=1, queue=1, api_keys=("first", "second"), max_body=2000, max_new_tokens=150) as server:
        yield server


KEY = {"authorization": "Bearer second"}


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Let no step begin before the event is set."""
    go, step = threading.Event(), StaticSlots.step

    def slow_step(slots: StaticSlots, *arguments: Any) -> Any:
        go.wait(30)
        return step(slots, *arguments)

    monkeypatch.setattr(StaticSlots, "step", slow_step)
    return go


@pytest.mark.parametrize("shown", [None, "Bearer", "Bearer third", "Bearer firs", "Basic first", "Bearer pr\u00fcfung"])
def test_a_wrong_key(small: Running, shown: str | None) -> None:
    headers = {} if shown is None else {"authorization": shown.encode("latin-1")}
    answer = small.get("/v1/models", headers=headers)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        small.client(api_key="third").models.list()


def test_a_right_key_and_paths_without_one(small: Running) -> None:
    assert [model.id for model in small.client(api_key="first").models.list()] == ["tiny"]
    for path in ("/health", "/ready", "/v2/health/live", "/v2/health/ready"):
        assert small.get(path).status_code == 200


@pytest.mark.parametrize("told", [True, False], ids=["length told", "in parts"])
def test_a_body_that_is_too_large(small: Running, told: bool) -> None:
    body = b"x" * 10_000_000 if told else (b"x" * 1000 for _ in range(50))
    with httpx2.Client() as client:
        try:
            answer = client.post(f"{small.url}/v1/completions", content=body, headers=KEY)
        except httpx2.WriteError:  # refused before all of it was sent
            return
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"


def test_more_tokens_than_the_server_gives(small: Running) -> None:
    answer = small.post("/v1/completions", json={"prompt": "a", "max_tokens": 151}, headers=KEY)
    assert answer.status_code == 400
    assert "at most 150" in answer.json()["error"]["message"]


def test_a_full_queue_is_told_when_to_come_back(small: Running, slow: threading.Event) -> None:
    statuses: list[int] = []

    def ask() -> None:
        statuses.append(small.post("/v1/completions", json=LONG, headers=KEY).status_code)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_for(lambda: small.service.worker.running + small.service.worker.waiting == 2)
    refused = small.post("/v1/completions", json=LONG, headers=KEY)
    slow.set()
    for thread in threads:
        thread.join()
    assert statuses == [200, 200]
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    with pytest.raises(openai.BadRequestError, match="more sequences than this server takes"):
        small.client(api_key="first").completions.create(model="tiny", prompt="a", n=3)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(small: Running, stream: bool, slow: threading.Event) -> None:
    body = json.dumps(LONG | {"stream": stream})
    host, port = small.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer first\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        wait_for(lambda: small.service.worker.running == 1)
    computed = figure(small, "generation_tokens_total")
    time.sleep(0.2)  # the server sees the closed connection while the step waits
    slow.set()
    wait_for(lambda: small.service.worker.running + small.service.worker.waiting == 0)
    assert figure(small, "generation_tokens_total") - computed < 10


def figure(server: Running, name: str) -> float:
    lines = server.get("/metrics", headers=KEY).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"spike_export:{name}{{"))


def test_an_answer_that_takes_too_long(bundle: Path, slow: threading.Event) -> None:
    with running(bundle, timeout=0.3) as server:
        whole = server.post("/v1/completions", json=LONG)
        streamed = server.post("/v1/completions", json=LONG | {"stream": True})
        slow.set()
        assert whole.status_code == 504
        assert '"code":"timeout"' in streamed.text
        wait_for(lambda: server.service.worker.running + server.service.worker.waiting == 0)


def test_a_failed_engine_begins_anew_once(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = StaticSlots.step

    def failing(*_: Any) -> Any:
        raise EngineError("ONNX Runtime fails on 1 tokens: out of memory")

    with running(bundle) as server:
        monkeypatch.setattr(StaticSlots, "step", failing)
        assert server.post("/v1/completions", json=LONG).status_code == 503
        monkeypatch.setattr(StaticSlots, "step", step)
        wait_for(lambda: server.get("/ready").status_code == 200)
        assert server.post("/v1/completions", json=LONG).status_code == 200
        monkeypatch.setattr(StaticSlots, "step", failing)
        assert "engine_failed" in server.post("/v1/completions", json=LONG | {"stream": True}).text
        wait_for(lambda: server.service.worker.state == "stopped")
        for path in ("/ready", "/v2/health/ready", "/v2/models/tiny/ready"):
            assert server.get(path).status_code == 503
        for path in ("/health", "/v2/health/live"):
            assert server.get(path).status_code == 200
        assert server.post("/v1/completions", json=LONG).status_code == 503
        assert [event for event, _ in server.log].count("engine failed") == 2


def test_a_failed_runtime_is_let_go_before_the_next_is_loaded(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions of one bundle are shared while they live: the failed one would come back."""
    opened: list[weakref.ref[Any]] = []
    step, open_slots = StaticSlots.step, OnnxDecoding.open_slots

    def failing(*_: Any) -> Any:
        raise BaseException("a panic of native code")

    def recorded(decoding: OnnxDecoding, rows: int) -> Any:
        assert all(each() is None for each in opened), "the failed session is still there"
        opened.append(weakref.ref(decoding.session.session))
        return open_slots(decoding, rows)

    monkeypatch.setattr(OnnxDecoding, "open_slots", recorded)
    own = shutil.copytree(bundle, bundle.parent / "own")  # which no other test's engine holds open
    with running(own) as server:
        monkeypatch.setattr(StaticSlots, "step", failing)
        assert server.post("/v1/completions", json=LONG).status_code == 503
        monkeypatch.setattr(StaticSlots, "step", step)
        wait_for(lambda: server.get("/ready").status_code == 200)
        assert server.post("/v1/completions", json=LONG).status_code == 200
    assert len(opened) == 2


def test_a_fault_of_one_sequence_leaves_the_others_alone(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = Sampler.draw

    def faulty(sampler: Sampler, *arguments: Any) -> Any:
        if sampler._options.top_k == 7:
            raise IndexError("planted")
        return draw(sampler, *arguments)

    monkeypatch.setattr(Sampler, "draw", faulty)
    with running(bundle) as server:
        answer = server.post("/v1/completions", json={"prompt": "a", "top_k": 7})
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_error")
        assert server.post("/v1/completions", json={"prompt": "a"}).status_code == 200
        assert server.service.worker.restarts == 0


def test_a_body_that_does_not_arrive(small: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spike_export.serving.middleware.BODY_SECONDS", 0.1)
    host, port = small.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = "POST /tokenize HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer first\r\nContent-Length: 50\r\n\r\n{"
        connection.sendall(head.encode())
        assert b" 408 " in connection.recv(4096).splitlines()[0]


def test_a_client_that_does_not_read_is_left(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its row is free as soon as the answer is computed, and its connection when the time is up."""
    monkeypatch.setattr("spike_export.serving.openai.exchange._LAST_EVENT_SECONDS", 0.1)
    chunk = exchange.event_bytes
    monkeypatch.setattr(
        "spike_export.serving.openai.completions.event_bytes", lambda event: chunk(event) + b" " * 200_000
    )
    with running(bundle, timeout=0.5, prefix_cache=0) as server:
        host, port = server.url.removeprefix("http://").split(":")
        body = json.dumps(LONG | {"stream": True})
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            wait_for(lambda: server.service.worker.running + server.service.worker.waiting == 0)
            assert server.post("/v1/completions", json={"prompt": "a"}).status_code == 200
            wait_for(
                lambda: any(
                    fields.get("path") == "/v1/completions" and fields["milliseconds"] > 500
                    for event, fields in server.log
                    if event == "request"
                )
            )


def test_a_row_whose_logits_are_not_finite_leaves_the_others_alone(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    admit = StaticSlots.admit
    monkeypatch.setattr(
        StaticSlots, "admit", lambda slots, row, tokens: admit(slots, row, tokens) * (float("nan") if row else 1)
    )
    release = StaticSlots.release
    released: list[bool] = []
    monkeypatch.setattr(
        StaticSlots, "release", lambda *row, spoiled: (released.append(spoiled), release(*row, spoiled=spoiled))
    )
    with running(bundle) as server:
        answers = server.client().completions.with_raw_response
        with pytest.raises(openai.InternalServerError, match="not finite"):
            answers.create(model="tiny", prompt=["a", "b"], max_tokens=5)
        wait_for(lambda: len(released) == 2)
        assert sorted(released) == [False, True]
        assert server.post("/v1/completions", json={"prompt": "a"}).status_code == 200
