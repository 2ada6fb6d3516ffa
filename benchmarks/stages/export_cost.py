"""Time, memory, nodes and bytes of exporting a model unquantized: ours beside torch.onnx.export and mobius.

All read the same Hugging Face directory, SmolLM2-135M-Instruct in float32, and each runs in a process of its own, start
and imports included, until it is done or its time is up. torch.onnx.export (`dynamo=True`) traces transformers' model
without a cache, which is less than the others write. It needs onnxscript, and mobius is a program: neither is a
dependency of ours, so options say where they are installed, and what is not there is left out with a line.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.fetch_models import smollm2_path
from benchmarks.hf_directory import write_hf_directory
from benchmarks.peak_memory import in_own_process
from benchmarks.stages.job_resources import run_measured

_SAMPLE_SECONDS = 0.1
"""Between two looks at the memory; each reads all of /proc, and takes its time from the export."""

_TRACE = """
import sys
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
ids = torch.ones((2, 16), dtype=torch.int64)
names = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
torch.onnx.export(
    model, (), sys.argv[2] + "/model.onnx", dynamo=True, external_data=True,
    kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False},
    dynamic_shapes={"input_ids": names, "attention_mask": names, "use_cache": None},
)
"""


@dataclass(frozen=True)
class Exporter:
    """A way to make an ONNX model of an HF directory.

    Attributes:
        command: What to run; the directory and the folder to write to stand for `{model}` and `{out}`.
        probe: A command that succeeds where the exporter is installed.
    """

    name: str
    command: tuple[str, ...]
    probe: tuple[str, ...]


@dataclass(frozen=True)
class Cost:
    """What one export took and wrote.

    Attributes:
        seconds: Wall time, the process's start included; where it was cut off, until then.
        cpu_seconds: User and system.
        peak_rss: Bytes; sampled.
        nodes: Of the main graph and all functions it calls, each counted once; None where it was cut off.
        bytes_written: Graph and weights; None where it was cut off.
    """

    exporter: str
    seconds: float
    cpu_seconds: float
    peak_rss: int
    nodes: int | None
    bytes_written: int | None


class ExporterError(Exception):
    """An exporter failed; the message is one line."""


def main() -> int:
    arguments = _arguments()
    costs, failed = [], False
    with tempfile.TemporaryDirectory(prefix="spike-export-cost-") as temporary:
        model = Path(temporary) / "model"
        in_own_process(write_model, arguments.model or smollm2_path(), model)
        for exporter in exporters(arguments.torch_python, arguments.mobius):
            if not installed(exporter):
                _say(f"{exporter.name}: left out, because `{' '.join(exporter.probe)}` fails")
                continue
            _say(f"{exporter.name}: started, at most {arguments.limit:.0f} s")
            out = Path(temporary) / "out" / exporter.name.replace(" ", "-")
            try:
                costs.append(measure(exporter, model, out, arguments.limit))
            except ExporterError as error:
                _say(f"export_cost: {error}")
                failed = True
            else:
                _say(f"{exporter.name}: {costs[-1].seconds:.1f} s")
            shutil.rmtree(out)
    print(table(costs))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(cost) for cost in costs], indent=2) + "\n", encoding="utf-8")
    return int(failed)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, help="a .gguf file or HF directory; SmolLM2 without")
    parser.add_argument("--torch-python", default=sys.executable, help="an interpreter that has onnxscript")
    parser.add_argument("--mobius", default="mobius", help="the program of mobius-onnx (measured with 0.1.0)")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds for each export (%(default)s by default)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    return parser.parse_args()


def exporters(torch_python: str, mobius: str) -> tuple[Exporter, ...]:
    """Return what is compared, ours first."""
    ours = str(Path(sys.executable).with_name("spike-export"))
    options = ("--no-quantize", "--dtype", "float32", "--quiet")
    return (
        Exporter("spike-export", (ours, "export", "{model}", *options, "--out", "{out}/b"), (ours, "--version")),
        Exporter(
            "torch.onnx.export",
            (torch_python, "-c", _TRACE, "{model}", "{out}"),
            (torch_python, "-c", "import onnxscript, torch, transformers"),
        ),
        Exporter("mobius", (mobius, "build", "--config", "{model}", "--dtype", "f32", "{out}"), (mobius, "--help")),
    )


def installed(exporter: Exporter) -> bool:
    """Return whether an exporter's probe succeeds."""
    try:
        finished = subprocess.run(exporter.probe, capture_output=True, check=False)
    except OSError:
        return False
    return finished.returncode == 0


def write_model(source: Path, folder: Path) -> None:
    """Write what all exporters read; called in its own process."""
    from spike_export.checkpoint.opening import open_checkpoint

    write_hf_directory(open_checkpoint(str(source)), folder)


def measure(exporter: Exporter, model: Path, out: Path, limit: float) -> Cost:
    """Run an exporter for at most `limit` seconds.

    Raises:
        ExporterError: It fails.
    """
    out.mkdir(parents=True)
    command = [word.format(model=model, out=out) if word != _TRACE else word for word in exporter.command]
    use = run_measured(command, _SAMPLE_SECONDS, limit)
    if use.exit_code and use.seconds >= limit:
        return Cost(exporter.name, use.seconds, use.cpu_seconds, use.peak_rss, None, None)
    if use.exit_code:
        raise ExporterError(f"{exporter.name} fails with exit code {use.exit_code}")
    nodes, size = in_own_process(graph_size, out)
    return Cost(exporter.name, use.seconds, use.cpu_seconds, use.peak_rss, nodes, size)


def graph_size(folder: Path) -> tuple[int, int]:
    """Return the number of nodes of the model somewhere below a folder, and the bytes of graph and weights."""
    import onnx

    (path,) = folder.rglob("*.onnx")
    model = onnx.load(path, load_external_data=False)
    nodes = len(model.graph.node) + sum(len(function.node) for function in model.functions)
    return nodes, sum(file.stat().st_size for file in path.parent.glob("*.onnx*"))


def table(costs: Sequence[Cost]) -> str:
    """Return the figures for reading."""
    lines = [f"{'':18} {'seconds':>8} {'CPU s':>7} {'peak RSS MB':>12} {'nodes':>6} {'MB written':>11}"]
    for cost in costs:
        use = f"{cost.exporter:18} {cost.seconds:8.1f} {cost.cpu_seconds:7.1f} {cost.peak_rss / 1e6:12.0f}"
        if cost.nodes is None or cost.bytes_written is None:
            lines.append(f"{use} cut off, not done")
        else:
            lines.append(f"{use} {cost.nodes:6} {cost.bytes_written / 1e6:11.1f}")
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
