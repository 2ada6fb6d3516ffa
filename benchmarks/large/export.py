"""Peak memory and speed of exporting a model of 7B parameters, beside copying its files on the same disk.

The weights are random, so that nothing is downloaded, and the recipe is made up: neither memory nor time depends on
their values. Copying reads the checkpoint's bytes and writes as many; export reads them too (twice: it also hashes
them), and has its rate told in the same bytes, those of the checkpoint.

The recipe quantizes and does nothing else, unless --prefix-and-smoothing is given. Then export reads the checkpoint
once more, to compute the prefix's keys and values through all layers in float32, and folds scales into the weights that
it writes.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

from benchmarks.large.invented_recipe import invented_recipe
from benchmarks.large.model import FolderError, Shape, Stored, write_model
from benchmarks.peak_memory import in_own_process, peak_rss
from spike_export.artifacts.errors import ArtifactError, CheckpointError

PEAK_RSS_TARGET = 2_500_000_000
"""Bytes; for the shape that is the default."""

RATE_TARGET = 0.5
"""Of the rate of a copy."""


@dataclass(frozen=True)
class Use:
    """What one export, or one copy, took.

    Attributes:
        seconds: Wall time, until the disk has all bytes.
        cpu_seconds: User and system, of all threads: on a busy machine it says what the wall time cannot.
        bytes_written: Size of what was written.
        start_rss: Peak in bytes before: Python and its libraries.
        peak_rss: Bytes; of the process, which did nothing else.
    """

    seconds: float
    cpu_seconds: float
    bytes_written: int
    start_rss: int
    peak_rss: int

    def rate(self, checkpoint_bytes: int) -> float:
        """Return the checkpoint's bytes per second."""
        return checkpoint_bytes / self.seconds


def main() -> int:
    arguments = _arguments()
    shape = Shape(layers=arguments.layers)
    with tempfile.TemporaryDirectory(prefix="spike-export-large-", dir=arguments.scratch) as temporary:
        scratch = Path(temporary)
        folder = arguments.folder or scratch / "model"
        try:
            write_model(folder, shape, arguments.stored_dtype, arguments.seed)
            sync(folder)  # else the first copy runs beside the kernel's writing
            before = os.getloadavg()[0]
            given = (arguments.quantize, arguments.prefix_and_smoothing)
            rounds = [_round(folder, scratch, *given) for _ in range(arguments.rounds)]
        except (FolderError, CheckpointError, ArtifactError) as error:
            print(f"large_export: {error}", file=sys.stderr)
            return 2
    copies, exports = ([uses[place] for uses in rounds] for place in (0, 1))
    checkpoint_bytes = shape.stored_bytes()
    print(table(copies, exports, checkpoint_bytes))
    print(f"load average {before:.1f} before and {os.getloadavg()[0]:.1f} after")
    if arguments.json is not None:
        document = {
            "shape": asdict(shape),
            "quantize": arguments.quantize,
            "prefix_and_smoothing": arguments.prefix_and_smoothing,
            "checkpoint_bytes": checkpoint_bytes,
            "copies": [asdict(use) for use in copies],
            "exports": [asdict(use) for use in exports],
        }
        arguments.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4, help="%(default)s by default; 32 for all of a 7B model")
    parser.add_argument("--folder", type=Path, help="keep the model here, and use again what is here")
    parser.add_argument("--scratch", type=Path, help="where all else is written, and deleted afterwards")
    parser.add_argument("--stored-dtype", choices=get_args(Stored), default="float16", help="of the weight files")
    recipe = parser.add_mutually_exclusive_group()
    recipe.add_argument("--no-quantize", dest="quantize", action="store_false", help="write the linears in float16")
    recipe.add_argument("--prefix-and-smoothing", action="store_true", help="by a recipe that has both")
    parser.add_argument("--rounds", type=int, default=1, help="of one copy and one export each")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    return parser.parse_args()


def _round(folder: Path, scratch: Path, quantize: bool, prefix_and_smoothing: bool) -> tuple[Use, Use]:
    uses = []
    for name, work, options in (
        ("copying", _copy, ()),
        ("exporting", _export, (quantize, prefix_and_smoothing)),
    ):
        print(name, file=sys.stderr, flush=True)
        place = scratch / "written"
        uses.append(in_own_process(work, folder, place, *options))
        shutil.rmtree(place)
    return uses[0], uses[1]


def _copy(folder: Path, place: Path) -> Use:
    """Copy the checkpoint; called in a process of its own."""
    start = _Start()
    shutil.copytree(folder, place)
    return start.use(place)


def _export(folder: Path, place: Path, quantize: bool, prefix_and_smoothing: bool) -> Use:
    """Export the checkpoint; called in a process of its own."""
    import onnx  # noqa: F401  # which takes a second to import, and export_bundle would do so in the measured time

    from spike_export.calibration.decoder.layerwise import Decoder, Execution
    from spike_export.checkpoint.opening import open_checkpoint
    from spike_export.export.bundle import ExportOptions, export_bundle

    checkpoint = open_checkpoint(str(folder))
    if prefix_and_smoothing:
        Decoder(checkpoint, Execution(resident=False)).skeleton  # noqa: B018  # which imports torch: the same
    start = _Start()
    recipe = invented_recipe(checkpoint, prefix_and_smoothing=prefix_and_smoothing) if quantize else None
    export_bundle(checkpoint, recipe, ExportOptions("float16"), place)
    return start.use(place)


class _Start:
    """When the work of this process began, and what the process had taken until then."""

    def __init__(self) -> None:
        self._rss, self._cpu, self._time = peak_rss(), time.process_time(), time.perf_counter()

    def use(self, place: Path) -> Use:
        """Return what it took to write a folder."""
        sync(place)
        seconds, cpu = time.perf_counter() - self._time, time.process_time() - self._cpu
        written = sum(path.stat().st_size for path in place.iterdir())
        return Use(seconds, cpu, written, self._rss, peak_rss())


def sync(folder: Path) -> None:
    """Wait until the disk has a folder's files."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def table(copies: list[Use], exports: list[Use], checkpoint_bytes: int) -> str:
    """Return the figures for reading, with the verdicts."""
    lines = [
        f"{checkpoint_bytes / 1e6:.0f} MB of weights",
        f"{'':9} {'seconds':>8} {'CPU s':>7} {'MB/s':>7} {'MB written':>11} {'start RSS MB':>13} {'peak RSS MB':>12}",
    ]
    for name, uses in (("copy", copies), ("export", exports)):
        lines += [
            f"{name:9} {use.seconds:8.1f} {use.cpu_seconds:7.1f} {use.rate(checkpoint_bytes) / 1e6:7.0f} "
            f"{use.bytes_written / 1e6:11.0f} {use.start_rss / 1e6:13.0f} {use.peak_rss / 1e6:12.0f}"
            for use in uses
        ]
    ratio = min(use.seconds for use in copies) / min(use.seconds for use in exports)
    peak = max(use.peak_rss for use in exports)
    lines += [
        f"export over copy, in bytes per second: {ratio:.2f} (aim {RATE_TARGET}) {_verdict(ratio >= RATE_TARGET)}",
        f"peak RSS {peak / 1e6:.0f} MB (aim {PEAK_RSS_TARGET / 1e6:.0f} MB) {_verdict(peak <= PEAK_RSS_TARGET)}",
    ]
    return "\n".join(lines)


def _verdict(met: bool) -> str:
    return "met" if met else "missed"


if __name__ == "__main__":
    sys.exit(main())
