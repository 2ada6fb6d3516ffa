"""Many requests at once, some of which leave, are malformed or too long: nothing is lost, mixed up or left behind."""

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import httpx2
import pytest

from spike_export.engines.engine import Engine
from tests.support.tiny_service import CAPACITY, Running, running

PROMPTS = ["ab" * length for length in (1, 9, 20, 33, 50, 71)]
CLIENTS = 12


async def one(client: httpx2.AsyncClient, kind: str, prompt: str, tokens: int) -> tuple[str, str]:
    """Return what came of a request: its kind, and its text or error code."""
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": kind != "whole"}
    if kind == "malformed":
        answer = await client.post("/v1/completions", content=b'{"prompt": ')
        return kind, str(answer.status_code)
    if kind == "too long":
        answer = await client.post("/v1/completions", json=body | {"prompt": "x" * (CAPACITY + 1)})
        return kind, str(answer.status_code)
    if kind == "whole":
        return kind, (await client.post("/v1/completions", json=body)).json()["choices"][0]["text"]
    text = ""
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
                if kind == "leaves":
                    return kind, ""
    return kind, text


async def load(url: str, count: int) -> list[tuple[str, int, int, tuple[str, str]]]:
    draw = random.Random(0)
    kinds = draw.choices(["stream", "whole", "leaves", "malformed"], [5, 4, 5, 1], k=count)
    kinds[count // 2] = "too long"
    waiting = iter([(kind, draw.randrange(len(PROMPTS)), draw.choice((3, 11, 25))) for kind in kinds])
    found = []
    headers = {"content-type": "application/json"}
    async with httpx2.AsyncClient(base_url=url, timeout=120, headers=headers) as client:

        async def ask_on() -> None:
            for kind, prompt, tokens in waiting:
                found.append((kind, prompt, tokens, await one(client, kind, PROMPTS[prompt], tokens)))

        await asyncio.gather(*(ask_on() for _ in range(CLIENTS)))
    return found


def require_all_right(bundle: Path, server: Running, count: int) -> None:
    alone = Engine.open(bundle, threads=1)
    texts = [one.text for one in alone.generate(PROMPTS, max_new_tokens=25, ignore_eos=True, logprobs=None)]
    found = asyncio.run(load(server.url, count))
    assert len(found) == count
    for kind, prompt, tokens, (_, told) in found:
        if kind in ("malformed", "too long"):
            assert told == "400"
        elif kind != "leaves":
            (expected,) = alone.generate(PROMPTS[prompt], max_new_tokens=tokens, ignore_eos=True)
            assert told == expected.text
            assert texts[prompt].startswith(told.rstrip("\N{REPLACEMENT CHARACTER}"))
    worker = server.service.worker
    for _ in range(500):
        if worker.running + worker.waiting == 0:
            return
        server.get("/health")
    pytest.fail("sequences are left behind")


def test_requests_of_all_kinds(bundle: Path) -> None:
    with running(bundle, queue=CLIENTS) as server:
        require_all_right(bundle, server, 60)


@pytest.mark.slow
def test_a_thousand_requests_leave_no_memory_behind(bundle: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])

    with running(bundle, queue=CLIENTS, prefix_cache=1 << 20) as server:
        require_all_right(bundle, server, 300)
        before = resident()
        require_all_right(bundle, server, 1000)
        assert resident() < before * 1.03
