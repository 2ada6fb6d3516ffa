"""The build process seen from outside, with small programs in its place."""

import sys
from pathlib import Path

import pytest

from spike_export.artifacts.errors import EngineError
from spike_export.artifacts.progress import silent
from spike_export.engines.build import child_process
from spike_export.engines.build.child_process import BuildFaultError, run_build
from spike_export.engines.build.request import BuildRequest

REQUEST = BuildRequest(
    backend="tensorrt-rtx",
    graph="model.onnx",
    plan="engine.plan",
    targets=("SM86",),
    profiles=("decode",),
    batch=(1, 1, 1),
    context=64,
    typical_prompt=64,
    max_prompt=64,
    prefix=0,
    optimization_level=3,
)


def program(text: str) -> tuple[str, ...]:
    return (sys.executable, "-c", f"import json, os, signal, sys, time\nsys.stdin.readline()\n{text}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "crashed inside TensorRT (SIGSEGV)"),
        ("print('terminate called', file=sys.stderr, flush=True); os.abort()", "(SIGABRT)"),
        ("print('terminate called', file=sys.stderr, flush=True); os.abort()", "it said last: terminate called"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed (SIGKILL), most likely because memory ran out"),
        ("sys.exit(3)", "exit code 3 and no result"),
        ("raise RuntimeError('odd')", "RuntimeError: odd"),
        ("print(json.dumps({'event': 'failure', 'message': 'node x', 'errno': None}))", "node x"),
    ],
)
def test_a_death_or_failure_is_one_clear_error(text: str, message: str) -> None:
    with pytest.raises(EngineError) as caught:
        run_build(REQUEST, silent, program(text))
    assert message in str(caught.value)


def test_profiles_are_advised_to_be_split_only_where_there_are_several() -> None:
    kill = program("os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(EngineError, match="memory ran out; free memory, or use a larger machine"):
        run_build(REQUEST, silent, kill)
    with pytest.raises(EngineError, match=r"memory ran out; build the profiles one by one \(--profiles split\), free"):
        run_build(REQUEST.model_copy(update={"profiles": ("prefill", "decode")}), silent, kill)


def test_a_program_that_does_not_even_start_reading_is_reported() -> None:
    with pytest.raises(EngineError, match="exit code 4"):
        run_build(REQUEST, silent, (sys.executable, "-c", "import os; os.close(0); os._exit(4)"))


FAULTY = """
import sys
import spike_export.engines.build.process as process

def planted(*_):
    raise KeyError("location")

process.build = planted
sys.exit(process.main())
"""


def test_a_fault_of_the_program_stays_one_and_brings_its_traceback() -> None:
    with pytest.raises(BuildFaultError, match="KeyError: 'location'") as caught:
        run_build(REQUEST, silent, (sys.executable, "-c", FAULTY))
    (note,) = caught.value.__notes__
    assert "in planted" in note
    assert note.rstrip().endswith("KeyError: 'location'")


def test_a_full_disk_stays_an_os_error() -> None:
    event = "{'event': 'failure', 'message': 'No space left on device', 'errno': 28}"
    with pytest.raises(OSError, match="No space left") as caught:
        run_build(REQUEST, silent, program(f"print(json.dumps({event}))"))
    assert caught.value.errno == 28


@pytest.mark.parametrize(
    "reaction",
    ["sys.stdin.read(); open(mark, 'w').write('asked')", "signal.pause()"],
    ids=["obeys", "has to be killed"],
)
def test_an_interrupt_ends_the_process_and_goes_on(
    reaction: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "asked" not in reaction:
        monkeypatch.setattr(child_process, "_PATIENCE", 0.3)
    mark, pid_file = tmp_path / "mark", tmp_path / "pid"
    event = "{'event': 'progress', 'what': 'x', 'done': 1, 'total': 2}"
    text = (
        f"mark = {str(mark)!r}\nopen({str(pid_file)!r}, 'w').write(str(os.getpid()))\n"
        f"print(json.dumps({event}), flush=True)\n{reaction}"
    )

    def interrupt(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_build(REQUEST, interrupt, program(text))
    assert not Path(f"/proc/{pid_file.read_text()}").exists()
    assert mark.exists() == ("asked" in reaction)
