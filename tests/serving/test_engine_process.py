"""The engine in a process of its own: the same texts, and a server that outlives it."""

import os
import re
import signal
from pathlib import Path

from spike_export.engines.engine import Engine
from spike_export.serving.engine_process import EngineProcess, SavingProcessSlots
from spike_export.serving.scheduling.batch import Batch
from tests.serving.test_operation import LONG, wait_for
from tests.support.tiny_service import Running, running

DASHBOARD = Path(__file__).parents[2] / "docs" / "serving-dashboard.json"


def process_of(server: Running) -> EngineProcess:
    batch = server.service.worker._batch
    assert isinstance(batch, Batch)
    assert isinstance(batch._slots, SavingProcessSlots)
    return batch._slots.process


def kill(server: Running) -> None:
    os.kill(process_of(server).pid, signal.SIGKILL)


def test_a_killed_engine_begins_anew_once(bundle: Path) -> None:
    """While it computes: requests end with an error. While nobody asks: the server is unready all the same."""
    with running(bundle, engine_process=True, prefix_cache=1 << 16, sample_clipping=1.0) as server:
        expected = Engine.open(bundle, threads=1).generate("a" * 70, max_new_tokens=8, ignore_eos=True)[0].text
        answers = [
            server.post("/v1/completions", json={"prompt": "a" * 70, "max_tokens": 8, "ignore_eos": True}).json()
            for _ in range(2)
        ]
        assert [answer["choices"][0]["text"] for answer in answers] == [expected] * 2
        assert answers[1]["usage"]["prompt_tokens_details"]["cached_tokens"] == 64
        figures = server.get("/metrics").text
        shown = re.findall(r"spike_export:\w+", DASHBOARD.read_text(encoding="utf-8"))
        assert all(f"# TYPE {name.removesuffix('_bucket')} " in figures for name in shown)
        for group in ("attention_input", "o_proj", "gate_up", "down_proj"):
            name = f'activations_total{{group="{group}",model_name="tiny"}} '
            clipped, sampled = (float(figures.split(f"{kind}_{name}")[1].split()[0]) for kind in ("clipped", "sampled"))
            assert 0 <= clipped < sampled

        for number in range(20):  # the store holds less: what it lets go is let go there too
            server.post("/v1/completions", json={"prompt": f"{number:02}" * 40, "max_tokens": 1})

        with server.client().completions.create(model="tiny", prompt="a", stream=True, **STREAM) as stream:
            next(iter(stream))
            kill(server)
            wait_for(lambda: server.get("/ready").status_code == 503)
            assert server.post("/v1/completions", json=LONG).status_code == 503
        wait_for(lambda: server.get("/ready").status_code == 200)
        answer = server.post("/v1/completions", json={"prompt": "a" * 70, "max_tokens": 8, "ignore_eos": True})
        assert answer.json()["choices"][0]["text"] == expected

        kill(server)
        wait_for(lambda: server.service.worker.state == "stopped")
        assert server.get("/ready").status_code == 503
        reasons = [fields["reason"] for event, fields in server.log if event == "engine failed"]
        assert reasons == ["the engine's process was ended by SIGKILL; perhaps memory ran out"] * 2


STREAM = {"max_tokens": 150, "extra_body": {"ignore_eos": True}}
