"""A plan's parity and speed on an NVIDIA GPU, beside ONNX Runtime and torch, and beside what the GPU could do at most.

Run on the GPU machine: python -m benchmarks.gpu [MODEL]. It measures with whatever of tensorrt, tensorrt_rtx and
onnxruntime-gpu is installed, says what it left out and why, and writes benchmarks/results/GPU-DATE.json. Exit codes: 0
done, 1 a plan's logits are not ONNX Runtime's, 2 there is no GPU, or the model cannot be read.
"""

import argparse
import importlib.metadata
import platform
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.gpu.report import MachineName, Report, result_path, text, write
from benchmarks.gpu.work import VARIANTS, Model, Variant, calls

if TYPE_CHECKING:
    from spike_export.artifacts.recipe import Recipe
    from spike_export.checkpoint.checkpoint import Checkpoint
    from spike_export.engines.plan.backend import Machine

RESULTS = Path(__file__).resolve().parents[1] / "results"
PARTS = ("plans", "onnxruntime", "torch")
PACKAGES = ("torch", "tensorrt", "tensorrt_rtx", "onnxruntime", "onnxruntime-gpu", "spike-export")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    from benchmarks.fetch_models import FetchError
    from benchmarks.large.model import FolderError
    from spike_export.artifacts.errors import SpikeExportError
    from spike_export.engines.plan.backend import detect_machine

    machine = detect_machine()
    reason = no_gpu(machine)
    if reason is not None:
        print(f"gpu: {reason}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="spike-export-gpu-") as temporary:
        scratch = arguments.scratch or Path(temporary)
        try:
            report = _measure(arguments, machine, scratch)
        except (SpikeExportError, FetchError, FolderError) as error:
            print(f"gpu: {error}", file=sys.stderr)
            return 2
    path = result_path(arguments.results, report.machine.gpu, date.today())
    write(report, path)
    print(text(report))
    print(f"written: {path}")
    return 0 if report.passed else 1


def no_gpu(machine: "Machine") -> str | None:
    """Return why nothing can be measured here; None where something can."""
    import torch

    if machine.gpu is None:
        return "no NVIDIA GPU was found; run this on the machine that has one"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} does not see the {machine.gpu.name}; install torch with CUDA"
    return None


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [variant.name for variant in VARIANTS]
    parser.add_argument("model", nargs="?", help="HF directory or .gguf file; SmolLM2-135M-Instruct without")
    parser.add_argument("--random-layers", type=int, metavar="N", help="a generated LLaMA of 7B width instead")
    parser.add_argument("--recipe", type=Path, help="quantize by this recipe (without its prefix), not an invented one")
    parser.add_argument("--variants", nargs="+", choices=names, default=names)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prefill, and in the cache of a step")
    parser.add_argument("--repeats", type=int, default=51, help="calls per figure")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--scratch", type=Path, help="keep bundles and plans here, and use again what is here")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON")
    return parser.parse_args(argv)


def _measure(arguments: argparse.Namespace, machine: "Machine", scratch: Path) -> Report:
    import torch

    from benchmarks.gpu.engines import Harness, capacity_for, export_variants, wanted_variants
    from benchmarks.gpu.torch_products import model_products, peaks

    assert machine.gpu is not None
    device = torch.device("cuda", 0)
    checkpoint = _checkpoint(arguments, scratch)
    model = Model.of(checkpoint.config)
    variants, lacking = wanted_variants(_chosen(arguments.variants), machine.gpu.target)
    say("measuring what the GPU does at most")
    seen, missing = peaks(device)
    report = Report(_machine_name(machine), checkpoint.name, seen, skipped=lacking | missing)
    capacity = capacity_for(arguments.prompt, arguments.repeats)
    measured = calls(arguments.batches, arguments.prompt, capacity)
    harness = Harness(model, seen, machine, scratch, arguments.repeats)
    if {"plans", "onnxruntime"} & set(arguments.parts):
        say("exporting")
        bundles = export_variants(checkpoint, _recipe(arguments, checkpoint), variants, capacity, scratch)
        if "plans" in arguments.parts:
            harness.measure_plans(bundles, measured)
        if "onnxruntime" in arguments.parts:
            harness.measure_onnx_runtime(bundles, measured)
    if "torch" in arguments.parts:
        say("measuring torch's products")
        rows = list(dict.fromkeys(call.batch * call.tokens for call in measured))
        kinds = [kind for kind in seen.operations if kind != "fp8" or any(v.product == "fp8" for v in variants)]
        report.products, refused = model_products(model, rows, kinds, device)
        report.skipped |= refused
    report.timed, report.parity = harness.timed, harness.parity
    report.skipped |= harness.skipped | {
        f"part {part}": "not asked for" for part in PARTS if part not in arguments.parts
    }
    return report


def _chosen(names: Sequence[str]) -> tuple[Variant, ...]:
    return tuple(variant for variant in VARIANTS if variant.name in names)


def _checkpoint(arguments: argparse.Namespace, scratch: Path) -> "Checkpoint":
    from benchmarks.fetch_models import smollm2_path
    from benchmarks.large.model import Shape, write_model
    from spike_export.checkpoint.opening import open_checkpoint

    if arguments.random_layers is None:
        return open_checkpoint(arguments.model or str(smollm2_path()))
    folder = scratch / "random-model"
    say("generating a model")
    write_model(folder, Shape(layers=arguments.random_layers), "float16", 0)
    return open_checkpoint(str(folder))


def _recipe(arguments: argparse.Namespace, checkpoint: "Checkpoint") -> "Recipe":
    from benchmarks.large.invented_recipe import invented_recipe
    from spike_export.artifacts.recipe import load_recipe

    return load_recipe(arguments.recipe) if arguments.recipe else invented_recipe(checkpoint)


def _machine_name(machine: "Machine") -> MachineName:
    import torch

    assert machine.gpu is not None
    return MachineName(
        gpu=machine.gpu.name,
        target=machine.gpu.target,
        memory=torch.cuda.get_device_properties(0).total_memory,
        driver=driver_version(Path("/proc/driver/nvidia/version")),
        cpu=platform.processor() or platform.machine(),
        packages={name: version for name in PACKAGES if (version := _version(name))}
        | {"cuda": str(torch.version.cuda)},
    )


def driver_version(file: Path) -> str:
    """Return the driver's version from the kernel's file; `unknown` where there is none."""
    try:
        words = file.read_text(encoding="ascii", errors="replace").split()
    except OSError:
        return "unknown"
    return next((word for word in words if word[:1].isdigit() and "." in word), "unknown")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
