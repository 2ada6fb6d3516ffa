"""Where ONNX Runtime spends a bundle's time: prefill and decode on one thread, by operator of the optimized graph."""

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.speed.table import PREFILL_TOKENS, _bound_call
from spike_export.artifacts.manifest import GRAPH_FILE, load_manifest
from spike_export.engines.onnx_runtime.denormals import denormals_flushed
from spike_export.engines.onnx_runtime.session import session_options

_KERNEL = "_kernel_time"


@dataclass(frozen=True)
class OperatorTime:
    """All nodes of one operator.

    Attributes:
        seconds: The sum of the nodes' shortest runs, so that what disturbs one call is left out.
    """

    operator: str
    nodes: int
    seconds: float


def profile(bundle: Path, tokens: int, past: int, calls: int) -> list[OperatorTime]:
    """Run a bundle `calls` times on `tokens` after `past` and return its operators, the slowest first."""
    import onnxruntime as ort

    with tempfile.TemporaryDirectory(prefix="spike-export-profile-") as folder:
        options = session_options(1)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        with denormals_flushed():
            session = ort.InferenceSession(bundle / GRAPH_FILE, options, providers=["CPUExecutionProvider"])
            call = _bound_call(session, load_manifest(bundle), tokens, past)
            for _ in range(calls):
                call()
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    durations: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
            durations[event["args"]["op_name"]][event["name"]].append(event["dur"])
    times = [
        OperatorTime(operator, len(nodes), sum(min(runs) for runs in nodes.values()) / 1e6)
        for operator, nodes in durations.items()
    ]
    return sorted(times, key=lambda time: -time.seconds)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path, nargs="+", help="folder that export or benchmarks.speed --bundles wrote")
    parser.add_argument("--calls", type=int, default=5, help="of which each node's shortest run counts")
    parser.add_argument("--rows", type=int, default=12, help="operators to print")
    given = parser.parse_args(arguments)
    for bundle in given.bundle:
        for name, tokens, past in (("prefill", PREFILL_TOKENS, 0), ("decode", 1, PREFILL_TOKENS)):
            times = profile(bundle, tokens, past, given.calls)
            print(f"{bundle.name}, {name}: {1e3 * sum(time.seconds for time in times):.1f} ms in all kernels")
            for time in times[: given.rows]:
                print(f"  {1e3 * time.seconds:8.2f} ms  {time.operator} x {time.nodes}")


if __name__ == "__main__":
    main()
