"""A TensorRT plan as a service, over a pretended GPU: each answer is what the bundle alone says."""

import asyncio
import random
import shutil
from pathlib import Path
from typing import Any

import httpx2
import pytest

from spike_export.artifacts.errors import EngineError
from spike_export.engines import plan_runtime
from spike_export.engines.engine import Engine
from spike_export.engines.runtime_choice import RuntimeChoice
from spike_export.engines.tensorrt import decoding as trt_decoding
from spike_export.engines.tensorrt.device import CudaDevice
from spike_export.serving.engine_process import EngineProcess
from tests.support.tiny.cli_models import call
from tests.support.tiny.service import CAPACITY, Running, running
from tests.support.trt_simulation import simulate

LONGEST = 64
PROMPTS = ["ab" * length for length in (1, 5, 9, 17, 24, 31)]


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle: Path) -> Path:
    """A plan for 2 sequences, beside the bundle that it was built from."""
    simulation = simulate(monkeypatch, tmp_path)
    shutil.copytree(bundle, tmp_path / "engine.plan.run" / "bundle")
    built = simulation.plan(bundle, "prefill", "decode", context=CAPACITY, prompt=LONGEST, batch=2)
    monkeypatch.setattr(plan_runtime, "usable_engine", lambda *_: (built,))
    monkeypatch.setattr(trt_decoding, "CudaDevice", lambda _: simulation.device)
    return shutil.copy(built.path, tmp_path / "engine.plan")


async def ask_all(server: Running) -> list[tuple[str, int, str]]:
    """Ask in any order, a third of the clients leaving; return prompt, tokens and text of the others' answers."""
    draw, found = random.Random(0), []
    asked = [(draw.choice(PROMPTS), draw.choice([1, 7, 20]), draw.random() < 0.3) for _ in range(18)]
    async with httpx2.AsyncClient(base_url=server.url, timeout=60) as client:

        async def ask(prompt: str, tokens: int, leaves: bool) -> None:
            body: dict[str, Any] = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": leaves}
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                if not leaves:
                    await answer.aread()
                    found.append((prompt, tokens, answer.json()["choices"][0]["text"]))

        await asyncio.gather(*(ask(*each) for each in asked))
    return found


def test_a_plan_is_served(bundle: Path, plan: Path) -> None:
    alone = Engine.open(bundle, threads=1)
    with running(plan, threads=None, queue=32) as server:
        found = asyncio.run(ask_all(server))
        assert len(found) > 8
        for prompt, tokens, text in found:
            (expected,) = alone.generate(prompt, max_new_tokens=tokens, ignore_eos=True)
            assert text == expected.text
        assert server.service.limits.rows == 2
        assert server.get("/model-card").json()["runtime"] == "TensorRT"
        refused = server.post("/v1/completions", json={"prompt": "a" * 65, "max_tokens": 1})
        assert refused.status_code == 400
        assert "the plan reads at most 64" in refused.json()["error"]["message"]


def test_what_a_plan_needs_is_told_in_one_line(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also from the process that would have computed."""
    made = trt_decoding.CudaDevice
    monkeypatch.setattr(trt_decoding, "CudaDevice", CudaDevice)
    told = call("serve", plan, "--no-engine-process").error
    assert "a plan runs on an NVIDIA GPU" in told
    assert "or run the bundle, which needs no GPU" in told
    monkeypatch.setattr(trt_decoding, "CudaDevice", made)
    with pytest.raises(EngineError, match="several are given; name one of them"):
        RuntimeChoice.of([plan, plan]).open_rows(1)
    with pytest.raises(EngineError, match="not a TensorRT or TensorRT-RTX plan"):
        EngineProcess(RuntimeChoice.of(plan), 1, 8, idle_limit=30, call_limit=600).open_slots()
