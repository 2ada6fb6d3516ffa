"""Where a decode step of several rows spends its time, in the graph that generation runs, bundle beside bundle.

One thread, so that the kernels' times add up. Rows are fed token by token; of each node the median of the last steps
counts. What products take is the bound of any gain by smaller numbers: attention and the rest are the same.

Run: python -m benchmarks.speed.step_profile FP32_BUNDLE BUNDLE --rows 8 16; of bundles with a static cache.
"""

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np

from spike_export.engines.onnx_runtime import session as sessions

_KERNEL = "_kernel_time"

PRODUCTS = frozenset({"MatMul", "FusedMatMul", "Gemm", "MatMulIntegerToFloat", "MatMulInteger", "MatMulNBits"})

ATTENTION = frozenset({"GroupQueryAttention", "Attention"})

_plain_options = sessions.session_options


def profile(bundle: Path, rows: int, context: int, steps: int) -> dict[str, float]:
    """Return operator → milliseconds of a decode step with `rows` rows behind `context` tokens."""
    with tempfile.TemporaryDirectory(prefix="spike-export-profile-") as folder:

        def options(threads: int = 0) -> Any:
            made = _plain_options(threads)
            made.enable_profiling = True
            made.profile_file_prefix = str(Path(folder) / "profile")
            return made

        with patch.object(sessions, "session_options", options):
            opened = sessions.open_for_generation(bundle, 1)
        batch, random = opened.begin(rows), np.random.default_rng(0)
        for _ in range(context + steps):
            batch.step(random.integers(0, opened.manifest.vocab_size, (rows, 1)))
        events = json.loads(Path(opened.session.end_profiling()).read_text(encoding="utf-8"))
    durations: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
            durations[event["args"]["op_name"]][event["name"]].append(event["dur"])
    return {
        operator: sum(median(runs[-steps:]) for runs in nodes.values()) / 1e3 for operator, nodes in durations.items()
    }


def parts(times: Mapping[str, float]) -> dict[str, float]:
    """Return milliseconds of products, of attention and of all else."""
    products = sum(each for operator, each in times.items() if operator in PRODUCTS)
    attention = sum(each for operator, each in times.items() if operator in ATTENTION)
    return {"products": products, "attention": attention, "rest": sum(times.values()) - products - attention}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path, nargs="+", help="folder that export wrote with --kv-cache static")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--operators", type=int, default=8, help="the slowest ones to print")
    given = parser.parse_args(arguments)
    for rows in given.rows:
        first: dict[str, float] | None = None
        for bundle in given.bundle:
            times = profile(bundle, rows, given.context, given.steps)
            found = parts(times) | {"all": sum(times.values())}
            first = first or found
            told = ", ".join(f"{name} {each:.1f} ms ({first[name] / each:.2f} x)" for name, each in found.items())
            print(f"{rows} rows, {bundle.name}: {told}", flush=True)
            for operator, each in sorted(times.items(), key=lambda item: -item[1])[: given.operators]:
                print(f"  {each:8.2f} ms  {operator}")


if __name__ == "__main__":
    main()
