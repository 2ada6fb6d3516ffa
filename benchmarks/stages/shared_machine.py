"""The spikes stage on a quiet machine and beside another process: three ways in which OpenMP's threads wait.

The other process turns in a loop on one processor. Runs take turns, so that whatever else the machine does hits both
policies alike. Linux only: the loop is bound to its processor.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.fetch_models import smollm2_path

SPINNING = {"GOMP_SPINCOUNT": "300000"}
"""What GNU's OpenMP does where nobody says how threads wait: 3 ms in a loop, then asleep (libgomp/env.c)."""

CHOSEN = "as the command waits"

POLICIES: Mapping[str, Mapping[str, str]] = {
    "spinning": SPINNING,
    CHOSEN: {},
    "asleep at once": {"OMP_WAIT_POLICY": "PASSIVE"},
}
"""Policy → variables of the user's environment; without any the command chooses."""

LOADED_TARGET = 2.0
"""Smallest speed-up beside the loop."""

QUIET_TARGET = 1.03
"""Largest ratio of times on the quiet machine."""

_OWN_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_COMMAND = "import sys; from spike_export.cli.main import main; sys.argv[0] = 'spike-export'; main()"
_DONE = re.compile(r"^\[1/1\] spikes: done in (?:(?P<minutes>\d+) min )?(?P<seconds>[\d.]+) s$", re.MULTILINE)


@dataclass
class Times:
    """Seconds of the spikes stage, by policy, in the rounds' order."""

    quiet: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in POLICIES})
    loaded: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in POLICIES})

    @property
    def quiet_ratio(self) -> float:
        """Median of the command's policy by that of spinning, on the quiet machine."""
        return _ratio(self.quiet)

    @property
    def speed_up(self) -> float:
        """How many times as fast as spinning the command's policy is beside the loop, by medians."""
        return 1 / _ratio(self.loaded)


def _ratio(seconds: Mapping[str, Sequence[float]]) -> float:
    spinning, chosen = (statistics.median(seconds[name]) for name in ("spinning", CHOSEN))
    return chosen / spinning


def main(arguments: Sequence[str] | None = None) -> int:
    given = _arguments(arguments)
    before = os.getloadavg()
    times = measure(given.model or str(smollm2_path()), given)
    print(table(times))
    print(f"{os.cpu_count()} processors; load average before {before[0]:.1f}, after {os.getloadavg()[0]:.1f}")
    if given.json is not None:
        document = {"load_average": before[0], "quiet": times.quiet, "loaded": times.loaded}
        given.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="HF directory or .gguf file; SmolLM2-135M-Instruct without")
    parser.add_argument("--corpus", default="builtin:help-topics", help="a text that is there, so that none is written")
    parser.add_argument("--samples", type=int, default=4, help="windows of the stage")
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each policy, quiet and loaded")
    parser.add_argument("--processor", type=int, default=0, help="where the loop turns")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the seconds there too")
    return parser.parse_args(arguments)


def measure(model: str, given: argparse.Namespace) -> Times:
    """Run the stage in turns; every second round takes the policies from the last to the first."""
    times = Times()
    for turn in range(given.rounds):
        names = list(POLICIES) if turn % 2 == 0 else list(POLICIES)[::-1]
        for name in names:
            times.quiet[name].append(stage_seconds(model, given, POLICIES[name]))
        with busy(given.processor):
            for name in names:
                times.loaded[name].append(stage_seconds(model, given, POLICIES[name]))
    return times


@contextmanager
def busy(processor: int) -> Iterator[None]:
    """Keep one processor busy for the block."""
    loop = f"import os; os.sched_setaffinity(0, {{{processor}}})\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", loop])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def stage_seconds(model: str, given: argparse.Namespace, policy: Mapping[str, str]) -> float:
    """Run the command's spikes stage in a fresh work directory and return the seconds that its own log says."""
    environment = {name: value for name, value in os.environ.items() if name not in _OWN_VARIABLES} | dict(policy)
    options = ["--shard", "1/1", "--samples", str(given.samples), "--length", str(given.length)]
    options += ["--corpus", given.corpus]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", _COMMAND, "calibrate", model, "--work-dir", folder, *options],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        )
    return seconds_of(done.stdout)


def seconds_of(log: str) -> float:
    """Return how long the spikes stage took.

    Raises:
        ValueError: The log does not say.
    """
    found = _DONE.search(log)
    if found is None:
        raise ValueError(f"the command's log does not say how long the stage took:\n{log}")
    return 60 * int(found["minutes"] or 0) + float(found["seconds"])


def table(times: Times) -> str:
    """Return medians, ratios and verdicts for reading."""
    lines = [f"{'machine':8} {'policy':22} {'median s':>9} {'min s':>7} {'max s':>7}"]
    for machine, seconds in (("quiet", times.quiet), ("loaded", times.loaded)):
        for name, each in seconds.items():
            lines.append(f"{machine:8} {name:22} {statistics.median(each):9.1f} {min(each):7.1f} {max(each):7.1f}")
    quiet = "met" if times.quiet_ratio <= QUIET_TARGET else "missed"
    loaded = "met" if times.speed_up >= LOADED_TARGET else "missed"
    return "\n".join(
        (
            *lines,
            f"quiet: {times.quiet_ratio:.3f} x the time; target at most {QUIET_TARGET:.2f} {quiet}",
            f"loaded: {times.speed_up:.2f} x as fast; target at least {LOADED_TARGET:.1f} {loaded}",
        )
    )


if __name__ == "__main__":
    sys.exit(main())
