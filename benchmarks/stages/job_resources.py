"""Wall time and peak memory of the main command, stage by stage. Linux only: memory is read from /proc.

Memory is the resident set of the command and all its children, sampled; a page that two of them share counts twice.
"""

import argparse
import json
import math
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.fetch_models import smollm2_path

START_UP = "(start-up)"
BETWEEN = "(between stages)"

_PAGE = resource.getpagesize()
_STAGE_LINE = re.compile(
    r"^\[\d+/\d+\] (?P<stage>[^:]+): (?P<event>started|unchanged|done in|failed after|interrupted)"
)

# Any of these would make the command draw a live display instead of printing lines.
_TERMINAL_VARIABLES = ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")


@dataclass
class StageUse:
    """What one stage took.

    Attributes:
        seconds: Wall time.
        peak_rss: Bytes; zero when the stage was too short to be sampled.
    """

    name: str
    seconds: float = 0.0
    peak_rss: int = 0


@dataclass
class StageLog:
    """Follows the command's output and attributes time and memory to the stage that is running."""

    stages: list[StageUse] = field(default_factory=lambda: [StageUse(START_UP)])
    _since: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self, line: str, now: float) -> None:
        """Take a line of output, `now` seconds after the start."""
        found = _STAGE_LINE.match(line)
        if found is None:
            return
        with self._lock:
            self._close(now)
            if found["event"] == "started":
                self.stages.append(StageUse(found["stage"]))
            else:
                self.stages.append(StageUse(BETWEEN))

    def sample(self, rss: int) -> None:
        """Take the memory now in use, in bytes."""
        with self._lock:
            self.stages[-1].peak_rss = max(self.stages[-1].peak_rss, rss)

    def finish(self, now: float) -> list[StageUse]:
        """Return the stages with their times, and the time between them as one; `now` as in `read`."""
        with self._lock:
            self._close(now)
        between = [stage for stage in self.stages if stage.name == BETWEEN]
        stages = [stage for stage in self.stages if stage.name != BETWEEN]
        if between:
            seconds, rss = sum(stage.seconds for stage in between), max(stage.peak_rss for stage in between)
            stages.append(StageUse(BETWEEN, seconds, rss))
        return stages

    def _close(self, now: float) -> None:
        self.stages[-1].seconds = now - self._since
        self._since = now


@dataclass(frozen=True)
class JobUse:
    """What the whole command took.

    Attributes:
        seconds: Wall time.
        cpu_seconds: Of all its processes, user and system.
        peak_rss: Bytes; of all its processes together, sampled.
        largest_process: Bytes; the kernel's own peak of its largest process, which no sampling misses.
    """

    command: tuple[str, ...]
    exit_code: int
    seconds: float
    cpu_seconds: float
    peak_rss: int
    largest_process: int
    stages: tuple[StageUse, ...]


def main() -> int:
    arguments, options = _arguments(sys.argv[1:])
    if not Path("/proc/self/statm").exists():
        print("job_resources: needs Linux: memory is read from /proc", file=sys.stderr)
        return 2
    # As an interruption does, so that the command does not outlive us.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="spike-export-job-") as temporary:
        out = arguments.out or Path(temporary) / "engine.plan"
        model = arguments.model or str(smollm2_path())
        command = [*shlex.split(arguments.command), model, "--out", str(out), *options]
        use = run_measured(command, arguments.interval)
    print(table(use))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(asdict(use), indent=2) + "\n", encoding="utf-8")
    return use.exit_code


def _arguments(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return our own arguments, and those after `--` for the command."""
    end = words.index("--") if "--" in words else len(words)
    own, options = words[:end], words[end + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, epilog="Options after -- are passed on to the command.")
    parser.add_argument("model", nargs="?", help="what to export; SmolLM2-135M-Instruct without")
    parser.add_argument("--out", type=Path, help="keep the plan and its work directory here")
    parser.add_argument("--interval", type=float, default=0.1, help="seconds between two samples of memory")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    installed = Path(sys.executable).with_name("spike-export")
    parser.add_argument("--command", default=shlex.quote(str(installed)), help="the command to measure")
    return parser.parse_args(own), options


def run_measured(command: Sequence[str], interval: float, limit: float | None = None) -> JobUse:
    """Run a command to its end, passing its output on, and sample the memory of its processes.

    Args:
        interval: Seconds between two samples.
        limit: Seconds after which the command and all it started are killed.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _TERMINAL_VARIABLES}
    log, before, start = StageLog(), _children_cpu(), time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment | {"PYTHONUNBUFFERED": "1"},
    )
    ended = threading.Event()
    deadline = start + (math.inf if limit is None else limit)
    sampler = threading.Thread(target=_sample, args=(process.pid, log, interval, ended, deadline))
    sampler.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            log.read(line, time.monotonic() - start)
            sys.stderr.write(line)
        exit_code = process.wait()
    finally:
        ended.set()
        sampler.join()
        if process.poll() is None:
            process.kill()
            process.wait()
    seconds = time.monotonic() - start
    stages = tuple(log.finish(seconds))
    return JobUse(
        command=tuple(command),
        exit_code=exit_code,
        seconds=seconds,
        cpu_seconds=_children_cpu() - before,
        peak_rss=max(stage.peak_rss for stage in stages),
        largest_process=resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        stages=stages,
    )


def _children_cpu() -> float:
    use = resource.getrusage(resource.RUSAGE_CHILDREN)
    return use.ru_utime + use.ru_stime


def _sample(root: int, log: StageLog, interval: float, ended: threading.Event, deadline: float) -> None:
    while not ended.is_set():
        log.sample(tree_rss(root))
        if time.monotonic() > deadline:
            _kill_tree(root)
        ended.wait(interval)


def _kill_tree(root: int) -> None:
    for process in _tree(root):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def tree_rss(root: int) -> int:
    """Return the resident memory, in bytes, of a process and all its descendants."""
    return sum(_rss(process) for process in _tree(root))


def _tree(root: int) -> set[int]:
    """Return a process and all its descendants."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            parent = _parent(folder)
            if parent is not None:
                parents[int(folder.name)] = parent
    return descendants(root, parents)


def descendants(root: int, parents: dict[int, int]) -> set[int]:
    """Return `root` and every process whose chain of parents leads to it."""
    children: dict[int, list[int]] = {}
    for process, parent in parents.items():
        children.setdefault(parent, []).append(process)
    found: set[int] = set()
    waiting = [root]
    while waiting:
        process = waiting.pop()
        if process not in found:
            found.add(process)
            waiting.extend(children.get(process, ()))
    return found


def _parent(folder: Path) -> int | None:
    try:
        stat = (folder / "stat").read_text(encoding="ascii", errors="replace")
    except OSError:  # It ended meanwhile.
        return None
    # The name, in parentheses, may hold anything; state and parent follow it.
    return int(stat.rpartition(")")[2].split()[1])


def _rss(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1]) * _PAGE
    except OSError:
        return 0


def table(use: JobUse) -> str:
    """Return the figures for reading."""
    rows: list[tuple[str, float, int]] = [(stage.name, stage.seconds, stage.peak_rss) for stage in use.stages]
    rows.append(("total", use.seconds, use.peak_rss))
    width = max(len(name) for name, _, _ in rows)
    lines = [f"{'stage':{width}} {'wall s':>8} {'peak RSS MB':>12}"]
    lines += [f"{name:{width}} {seconds:8.1f} {_megabytes(rss)}" for name, seconds, rss in rows]
    lines.append(
        f"CPU {use.cpu_seconds:.1f} s, largest process {use.largest_process / 1e6:.0f} MB, exit code {use.exit_code}"
    )
    return "\n".join(lines)


def _megabytes(rss: int) -> str:
    return f"{rss / 1e6:12.0f}" if rss else f"{'-':>12}"


if __name__ == "__main__":
    sys.exit(main())
