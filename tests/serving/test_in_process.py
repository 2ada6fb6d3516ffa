"""Requests to the application without a socket."""

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from spike_export.engines.runtime_choice import RuntimeChoice
from spike_export.serving.app import create_app
from spike_export.serving.in_process import posted
from spike_export.serving.service import Service, open_service
from spike_export.serving.settings import Settings
from tests.support.tiny.service import CAPACITY, write_served_bundle


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    choice = RuntimeChoice.of(write_served_bundle(tmp_path_factory.mktemp("bundle")), threads=1)
    settings = Settings(model="tiny", rows=1, queue=0, engine_process=False)
    made = open_service(choice, settings, lambda *_: None)
    yield made
    made.close()


async def asked(service: Service, **body: Any) -> tuple[int, str]:
    form = {"prompt": "ab cd", "max_tokens": 6, "temperature": 0, **body}
    async with posted(create_app(service), "/v1/completions", json.dumps(form).encode(), {}) as answered:
        return answered.status, (await answered.body()).decode()


def test_answers_streams_and_refusals_come_as_over_http(service: Service) -> None:
    status, body = asyncio.run(asked(service))
    assert status == 200
    text = json.loads(body)["choices"][0]["text"]
    status, body = asyncio.run(asked(service, stream=True))
    events = [line.removeprefix("data: ") for line in body.splitlines() if line]
    assert status == 200
    assert events[-1] == "[DONE]"
    assert "".join(choice["text"] for event in events[:-1] for choice in json.loads(event)["choices"]) == text
    status, body = asyncio.run(asked(service, temperature=9))
    assert status == 400
    assert "temperature" in json.loads(body)["error"]["message"]


def test_who_leaves_frees_the_row(service: Service) -> None:
    """There is one row and no queue."""

    async def leave() -> int:
        form = {"prompt": "ab cd", "max_tokens": CAPACITY - 20, "ignore_eos": True, "stream": True}
        async with posted(create_app(service), "/v1/completions", json.dumps(form).encode(), {}) as answered:
            async for piece in answered.pieces:
                assert piece
                break
        deadline = time.monotonic() + 5
        while (status := (await asked(service))[0]) == 429 and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        return status

    assert asyncio.run(leave()) == 200


def test_a_fault_of_the_application_is_raised() -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("broken")

    async def ask() -> None:
        async with posted(broken, "/", b"", {}):
            pass

    with pytest.raises(RuntimeError, match="broken"):
        asyncio.run(ask())
