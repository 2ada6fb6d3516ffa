"""`python -m tests.support.chaos`: the whole job, killed, interrupted and cut off from its disk at random moments.

Every attempt is the command line itself in a forked process: importing the libraries takes longer than the job. A
point passes when the same command then ends well, and leaves what an undisturbed run leaves. Prints a table; the exit
code is 1 unless every point passed.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tests.support.forked_command import import_libraries, run_and_exit
from tests.support.tiny.cli_models import SMALL, artifacts, write_inputs

OUT = "engine.plan"
OF_ITSELF = (OUT, f"{OUT}.run/report.html", f"{OUT}.run/commands.json")
"""What differs between two jobs that do the same: a plan's bytes, the report that shows them, the command line."""

CHANGING: dict[str, Any] = {"build_seconds": 0, "peak_memory": 0, "plan": None}
"""Of the sidecar: TensorRT-RTX does not build the same bytes twice."""


@dataclass(frozen=True)
class Attempt:
    """How a process ended.

    Attributes:
        code: Exit code; the negative signal of a killed process.
        seconds: From its start to its end.
        stage: The stage that it had started last.
    """

    code: int
    seconds: float
    stage: str
    error: str


@dataclass(frozen=True)
class Chaos:
    """A model and its corpus in a folder, and the job over them.

    Attributes:
        builds: Whether the job is the whole one; else it ends with the recipe.
    """

    inputs: Path
    builds: bool = True

    def attempt(
        self, folder: Path, *options: str, disturb: Callable[[int], None] = lambda pid: None, largest_file: int = -1
    ) -> Attempt:
        """Run the job in a forked process, its results in `folder`.

        Args:
            disturb: Called with the process's id once it runs.
            largest_file: Bytes at which every write to a file fails; -1 for no limit.
        """
        arguments = [*self._command(folder), "--corpus", str(self.inputs / "corpus.txt"), *SMALL, *options]
        (out, to_out), (err, to_err) = os.pipe(), os.pipe()  # a pipe holds all that is said, and has no size
        begun = time.monotonic()
        child = os.fork()
        if child == 0:
            _run(arguments, to_out, to_err, largest_file)
        os.close(to_out)
        os.close(to_err)
        disturb(child)
        _, status = os.waitpid(child, 0)
        seconds = time.monotonic() - begun
        with os.fdopen(out) as said, os.fdopen(err) as error:
            return Attempt(os.waitstatus_to_exitcode(status), seconds, _last_stage(said.read()), error.read())

    def _command(self, folder: Path) -> tuple[str, ...]:
        model = str(self.inputs / "model")
        if not self.builds:
            return ("calibrate", model, "--work-dir", str(folder / f"{OUT}.run"))
        engine = ("--backend", "tensorrt-rtx", "--target", "SM86", "--profiles", "decode")
        return (model, "--out", str(folder / OUT), *engine)


def _last_stage(said: str) -> str:
    started = [line for line in said.splitlines() if line.endswith(": started")]
    return started[-1].split("] ")[1].removesuffix(": started") if started else "-"


def _run(arguments: list[str], out: int, err: int, largest_file: int) -> NoReturn:
    """Be the command line, with a limit on its files."""
    if largest_file >= 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    run_and_exit(arguments, out, err)


def after(seconds: float, sent: signal.Signals) -> Callable[[int], None]:
    """Return what sends a signal to a process after some time."""

    def disturb(pid: int) -> None:
        time.sleep(seconds)
        os.kill(pid, sent)

    return disturb


def outcome(folder: Path) -> dict[str, str]:
    """Return every file of a finished job with its hash; of what tells of itself what the same job leaves again."""
    found = {name: hashlib.sha256(content).hexdigest() for name, content in artifacts(folder).items()}
    if OUT not in found:
        return found
    sidecar = json.loads((folder / "engine.json").read_text(encoding="utf-8"))
    if sidecar["plan"]["sha256"] != found[OUT]:
        found["engine.json"] = "of another plan"
    else:
        found["engine.json"] = json.dumps(sidecar | CHANGING)
    return found | dict.fromkeys(OF_ITSELF, "")


def differences(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    """Return the names of files that are missing, left over or of other content."""
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


@dataclass(frozen=True)
class Point:
    """One disturbance and what came of it.

    Attributes:
        faults: Nothing where the promise was kept.
    """

    what: str
    stage: str
    faults: tuple[str, ...]


def signalled(chaos: Chaos, expected: dict[str, str], folder: Path, sent: signal.Signals, seconds: float) -> Point:
    """Send a signal after some time, then give the same command again."""
    died = chaos.attempt(folder, disturb=after(seconds, sent))
    faults = []
    if sent == signal.SIGINT and (died.code, died.error.count("\n")) not in ((130, 1), (0, 0)):
        faults.append(f"interrupted with exit code {died.code}: {died.error[-300:]}")
    faults += _resumed(chaos, expected, folder)
    what = f"{sent.name} after {seconds:.2f} s" + (" (had ended)" if died.code == 0 else "")
    return Point(what, died.stage, tuple(faults))


def without_room(chaos: Chaos, states: tuple[dict[str, str], dict[str, str]], folder: Path, largest: int) -> Point:
    """Let every write fail from some byte of a file on, over the results of an earlier job, then without the limit.

    Args:
        states: What the earlier job left, which lies in `folder`, and what this one is to leave.
    """
    died = chaos.attempt(folder, "--seed", "1", largest_file=largest)
    faults = []
    if (died.code, died.error.count("\n")) not in ((2, 1), (0, 0)):
        faults.append(f"exit code {died.code}: {died.error[-300:]}")
    kept = {name: hashlib.sha256(content).hexdigest() for name, content in artifacts(folder).items()}
    faults += [f"{name} is half written" for name, found in kept.items() if not _whole(name, found, states)]
    faults += _resumed(chaos, states[1], folder, "--seed", "1")
    what = f"files end at byte {largest:,}" + (" (suffices)" if died.code == 0 else "")
    return Point(what, died.stage, tuple(faults))


def _whole(name: str, found: str, states: tuple[dict[str, str], dict[str, str]]) -> bool:
    """Return whether a file is an earlier job's or this one's; plan, sidecar and report are compared when resumed."""
    unlike = (*OF_ITSELF, "engine.json")
    passing = (".parts/", "recipe.json.sha256")  # parts of a pass, and hashes of both recipes
    return name in unlike or any(each in name for each in passing) or found in {state.get(name) for state in states}


def _resumed(chaos: Chaos, expected: dict[str, str], folder: Path, *options: str) -> list[str]:
    again = chaos.attempt(folder, *options)
    if again.code != 0:
        return [f"the same command ended with {again.code}: {again.error[-300:]}"]
    return [f"differs: {name}" for name in differences(outcome(folder), expected)]


def prepared(folder: Path, *, builds: bool) -> Chaos:
    """Return a job in an empty folder, with everything imported that a forked process needs."""
    import torch

    import_libraries()
    torch.set_num_threads(1)  # the tiny products would wait for threads of other processes
    write_inputs(folder)
    return Chaos(folder, builds)


def undisturbed(chaos: Chaos, folder: Path, *options: str) -> tuple[dict[str, str], float]:
    """Return what the job leaves, and how many seconds it takes."""
    done = chaos.attempt(folder, *options)
    if done.code != 0:
        sys.exit(f"the undisturbed job ended with {done.code}: {done.error}")
    return outcome(folder), done.seconds


def main(kills: int, interrupts: int, full_disks: int, seed: int, *, builds: bool = True) -> int:
    """Make all points and print a line for each; return the exit code."""
    draw = random.Random(seed)
    points: list[Point] = []
    with tempfile.TemporaryDirectory(prefix="spike-export-chaos-") as name:
        home = Path(name)
        chaos = prepared(home, builds=builds)
        first, seconds = undisturbed(chaos, home / "a")
        second = undisturbed(chaos, home / "b", "--seed", "1")[0] if full_disks else {}
        largest = max(path.stat().st_size for path in (home / "a").rglob("*"))
        print(f"the job takes {seconds:.1f} s undisturbed; its largest file has {largest:,} bytes; seed {seed}")
        signals = [signal.SIGKILL] * kills + [signal.SIGINT] * interrupts
        makers: list[Callable[[Path], Point]] = [
            *(_maker(signalled, chaos, first, sent=sent, seconds=draw.uniform(0, seconds)) for sent in signals),
            *(
                _maker(_over, chaos, (first, second), home / "a", int(largest ** draw.uniform(0, 1)))
                for _ in range(full_disks)
            ),
        ]
        for number, make in enumerate(makers, 1):
            folder = home / f"point {number}"
            point = make(folder)
            points.append(point)
            verdict = "; ".join(point.faults) or "identical"
            print(f"{number:4} {point.what:32} {point.stage:26} {verdict}", flush=True)
            shutil.rmtree(folder)
    return _summary(points)


def _maker(function: Callable[..., Point], chaos: Chaos, expected: Any, *last: Any, **more: Any) -> Any:
    return lambda folder: function(chaos, expected, folder, *last, **more)


def _over(chaos: Chaos, states: Any, folder: Path, earlier: Path, largest: int) -> Point:
    shutil.copytree(earlier, folder)
    return without_room(chaos, states, folder, largest)


def _summary(points: Sequence[Point]) -> int:
    kinds = [point.what.split()[0] for point in points]
    for kind in dict.fromkeys(kinds):
        of_kind = [point for point in points if point.what.startswith(kind)]
        passed = sum(not point.faults for point in of_kind)
        print(f"{kind:8} {passed} of {len(of_kind)} leave what an undisturbed job leaves")
    return 1 if any(point.faults for point in points) else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for option, count in (("kills", 50), ("interrupts", 10), ("full-disks", 20), ("seed", 0)):
        parser.add_argument(f"--{option}", type=int, default=count)
    parser.add_argument("--calibrate-only", action="store_true", help="end the job with the recipe")
    given = parser.parse_args()
    sys.exit(main(given.kills, given.interrupts, given.full_disks, given.seed, builds=not given.calibrate_only))
