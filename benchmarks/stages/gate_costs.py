"""What the checks of input, budgets, hashes and locks cost in a main job: their share of its processor seconds.

Runs `spike-export MODEL OPTIONS` in this process under cProfile with a clock of processor time. A part's seconds
include what its functions call. Processes over foreign text count when they end.
"""

import argparse
import cProfile
import pstats
import resource
import sys
import time
from collections.abc import Mapping
from typing import Any

import spike_export.artifacts.process.bounded_process as bounded
from spike_export.cli.main import run

PARTS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "hashes of weights": (("file_hash.py", "hash_files"),),
    "weights unchanged?": (("file_hash.py", "require_unchanged"),),
    "locks": (("sole_writer.py", "sole_writer"),),
    "whose file is replaced?": (("ownership.py", "require_replaceable"), ("ownership.py", "is_bundle")),
    "documents of ours": (
        ("recipe.py", "load_recipe"),
        ("manifest.py", "load_manifest"),
        ("check_document.py", "load_check"),
        ("sidecar.py", "load_sidecar"),
        ("description.py", "load_description"),
        ("choices.py", "_read"),
    ),
    "shapes of tensors": (("checkpoint.py", "validate_shapes"),),
    "graphs": (("graph_gate.py", "graph_fault"),),
    "memory": (("host_memory.py", "require_available"),),
    "budgets: asking": (("bounded_process.py", "ask"),),
}
"""Part → (file, function), as the profile names them."""

CHILDREN = "budgets: the processes"


def main() -> int:
    """Run the job and print the table; return the job's exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stages.gate_costs", description=__doc__)
    parser.add_argument("job", nargs=argparse.REMAINDER, help="arguments of spike-export")
    bounded_seconds = _watched_processes()
    profile, begun = cProfile.Profile(time.process_time), _processor_seconds()
    code = profile.runcall(run, parser.parse_args().job)
    total = _processor_seconds() - begun
    rows = {part: _seconds(profile, names) for part, names in PARTS.items()} | {CHILDREN: sum(bounded_seconds)}
    print(f"\n{'part':26} {'seconds':>8} {'share':>8}")
    for part, seconds in (*rows.items(), ("all of these", sum(rows.values())), ("the job", total)):
        print(f"{part:26} {seconds:8.2f} {seconds / total:8.2%}")
    return code


def _processor_seconds() -> float:
    uses = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(use.ru_utime + use.ru_stime for use in uses)


def _watched_processes() -> list[float]:
    """Return a list that gets the processor seconds of each process over foreign text when the process ends."""
    seconds: list[float] = []
    end = bounded._kill

    def kill(*process: Any) -> None:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        end(*process)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)

    bounded._kill = kill  # type: ignore[assignment]
    return seconds


def _seconds(profile: cProfile.Profile, names: tuple[tuple[str, str], ...]) -> float:
    stats: Any = pstats.Stats(profile)
    return sum(
        float(row[3])
        for (file, _, function), row in stats.stats.items()
        if any(function == name and file.endswith(f"/{place}") for place, name in names)
    )


if __name__ == "__main__":
    sys.exit(main())
