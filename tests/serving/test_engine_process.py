"""The engine in a process of its own: the same texts, and a server that outlives it."""

import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from spike_export.artifacts.errors import EngineError
from spike_export.engines.engine import Engine
from spike_export.engines.runtime_choice import RuntimeChoice
from spike_export.serving import engine_process
from spike_export.serving.engine_process import EngineProcess, SavingProcessSlots
from spike_export.serving.hang_watch import HangWatch
from spike_export.serving.scheduling.batch import Batch
from tests.serving.test_operation import LONG, wait_for
from tests.support.tiny.service import Running, running

DASHBOARD = Path(__file__).parents[2] / "docs" / "serving-dashboard.json"


def process_of(server: Running) -> EngineProcess:
    batch = server.service.worker._batch
    assert isinstance(batch, Batch)
    assert isinstance(batch._slots, SavingProcessSlots)
    return batch._slots.process


def test_an_engine_that_hangs_or_ends_begins_anew_once(bundle: Path) -> None:
    """While it computes: requests end with an error. While nobody asks: the server is unready all the same."""
    with running(bundle, engine_process=True, engine_idle=1.0, prefix_cache=1 << 16, sample_clipping=1.0) as server:
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
            os.kill(process_of(server).pid, signal.SIGSTOP)
            wait_for(lambda: server.get("/ready").status_code == 503)
            assert server.post("/v1/completions", json=LONG).status_code == 503
        wait_for(lambda: server.get("/ready").status_code == 200)
        answer = server.post("/v1/completions", json={"prompt": "a" * 70, "max_tokens": 8, "ignore_eos": True})
        assert answer.json()["choices"][0]["text"] == expected

        os.kill(process_of(server).pid, signal.SIGKILL)
        wait_for(lambda: server.service.worker.state == "stopped")
        assert server.get("/ready").status_code == 503
        hangs, ended = [fields["reason"] for event, fields in server.log if event == "engine failed"]
        assert (
            hangs == "the engine's process has not answered and has used no processor time for 1 seconds, and was ended"
        )
        assert ended == "the engine's process was ended by SIGKILL; perhaps memory ran out"


ANSWERING = """
import sys
from multiprocessing.connection import Connection
from spike_export.serving.engine_protocol import Shape
connection = Connection(int(sys.argv[1]))
connection.recv()
connection.send((True, Shape(1, 8, 8, 8, None), {}))
while connection.recv():
    connection.send((True, None, {}))
"""


@pytest.mark.parametrize(
    ("planted", "told"),
    [
        (signal.SIGSTOP, "has not answered and has used no processor time for 0.2 seconds, and was ended"),
        (signal.SIGKILL, "was ended by SIGKILL; perhaps memory ran out"),
    ],
)
def test_a_call_says_what_became_of_the_process(
    planted: signal.Signals, told: str, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_process, "_COMMAND", (sys.executable, "-P", "-c", ANSWERING))
    process = EngineProcess(RuntimeChoice.of(bundle), 1, 8, idle_limit=0.2, call_limit=9)
    slots = process.open_slots()
    slots.require_alive()
    os.kill(process.pid, planted)
    with pytest.raises(EngineError, match=f"^the engine's process {told}$"):
        slots.release(0)
    with pytest.raises(EngineError, match="was ended by SIGKILL"):
        slots.require_alive()


@pytest.mark.parametrize(
    ("ticks", "looks", "hang"),
    [
        ([7], 10, "used no processor time for 5 seconds"),
        ([7, 7, 7, 7, 7, 8], 15, "used no processor time for 5 seconds"),
        (range(99), 60, "has not answered for 30 seconds"),
        ([None], 60, "has not answered for 30 seconds"),
    ],
    ids=["stands still", "stops working", "works for ever", "nothing is known"],
)
def test_a_process_hangs_where_it_does_nothing(ticks: Sequence[int | None], looks: int, hang: str) -> None:
    """The last reading stays; an answer that comes one look earlier is waited for."""

    def answers_after(pauses: int) -> str | None:
        read, arrived = iter(ticks), iter([*[False] * pauses, True])
        last = ticks[-1]
        watch = HangWatch(idle=5, longest=30, cpu_ticks=lambda: next(read, last))
        return watch.hang(lambda seconds: next(arrived) if seconds == 0.5 else pytest.fail("another pause"))

    assert hang in str(answers_after(looks))
    assert answers_after(looks - 1) is None


STREAM = {"max_tokens": 150, "extra_body": {"ignore_eos": True}}
