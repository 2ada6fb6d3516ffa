"""Many requests at once, some of which leave, are malformed or too long: nothing is lost, mixed up or left behind."""

import asyncio
import json
import os
import random
import time
from functools import cache
from pathlib import Path
from typing import Any

import httpx2
import pytest

from spike_export.engines.engine import Engine
from spike_export.serving.hang_watch import cpu_ticks
from tests.serving.test_engine_process import process_of
from tests.support.tiny.service import CAPACITY, Running, running

PROMPTS = ["ab" * length for length in (1, 9, 20, 33, 50, 71)]
LENGTHS = (3, 11, 25)
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
    waiting = iter([(kind, draw.randrange(len(PROMPTS)), draw.choice(LENGTHS)) for kind in kinds])
    found = []
    headers = {"content-type": "application/json"}
    async with httpx2.AsyncClient(base_url=url, timeout=120, headers=headers) as client:

        async def ask_on() -> None:
            for kind, prompt, tokens in waiting:
                found.append((kind, prompt, tokens, await one(client, kind, PROMPTS[prompt], tokens)))

        await asyncio.gather(*(ask_on() for _ in range(CLIENTS)))
    return found


def require_all_right(bundle: Path, server: Running, count: int) -> float:
    """Ask, compare each answer with its solo run, and wait until all rows are free.

    Returns:
        Seconds of processor time that clients, server and engine took together; how busy the machine is does not show
        in them.
    """
    begun = processor_seconds(server)
    found = asyncio.run(load(server.url, count))
    taken = processor_seconds(server) - begun
    assert len(found) == count
    alone = texts_alone(bundle)
    for kind, prompt, tokens, (_, told) in found:
        if kind in ("malformed", "too long"):
            assert told == "400"
        elif kind != "leaves":
            assert told == alone[prompt, tokens]
    worker = server.service.worker
    for _ in range(500):
        if worker.running + worker.waiting == 0:
            return taken
        server.get("/health")
    pytest.fail("sequences are left behind")


def processor_seconds(server: Running) -> float:
    """Return what clients and server, which share this process, and the engine's process have used."""
    if not server.service.settings.engine_process:
        return time.process_time()
    ticks = cpu_ticks(process_of(server).pid)
    assert ticks is not None
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def resident_pages(server: Running) -> int:
    """Return the memory of this process and of the engine's."""
    names = ("self", process_of(server).pid)
    return sum(int(Path(f"/proc/{name}/statm").read_text(encoding="utf-8").split()[1]) for name in names)


@cache
def texts_alone(bundle: Path) -> dict[tuple[int, int], str]:
    """Return what follows each prompt with each number of tokens, generated alone."""
    engine = Engine.open(bundle, threads=1)
    return {
        (number, tokens): engine.generate(prompt, max_new_tokens=tokens, ignore_eos=True)[0].text
        for number, prompt in enumerate(PROMPTS)
        for tokens in LENGTHS
    }


def test_requests_of_all_kinds(bundle: Path) -> None:
    with running(bundle, queue=CLIENTS) as server:
        require_all_right(bundle, server, 60)


@pytest.mark.slow
def test_a_thousand_requests_leave_nothing_behind(bundle: Path) -> None:
    """Memory returns, and requests cost what they cost on a new server that is asked in turns with the old one."""
    settings = {"queue": CLIENTS, "prefix_cache": 1 << 20, "engine_process": True}
    with running(bundle, **settings) as old:
        require_all_right(bundle, old, 300)
        before = resident_pages(old)
        require_all_right(bundle, old, 1000)
        grown = resident_pages(old) / before
        with running(bundle, **settings) as new:
            require_all_right(bundle, new, 100)
            costs = [(require_all_right(bundle, new, 100), require_all_right(bundle, old, 100)) for _ in range(5)]
        first, last = (min(each) for each in zip(*costs, strict=True))
        print(f"memory after 1,000 requests: {grown:.4f} of before; 100 requests: {last / first:.3f} of a new server's")
        assert grown < 1.03
        assert last < first * 1.05
