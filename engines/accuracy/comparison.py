"""How close a bundle's next-token distributions are to the reference model's, on evaluation windows."""

import hashlib
import io
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from secrets import token_hex

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.errors import ArtifactError, EngineError
from spike_export.artifacts.files.atomic_write import describe_os_error
from spike_export.artifacts.files.free_space import require_free_space
from spike_export.artifacts.manifest import Manifest, load_manifest
from spike_export.artifacts.progress import Progress, silent
from spike_export.calibration.decoder.heap import collect_and_return_memory
from spike_export.calibration.decoder.layerwise import Decoder
from spike_export.calibration.decoder.perplexity import Likelihood
from spike_export.calibration.methods.context import Calibration
from spike_export.calibration.methods.spreading import Workers, even_parts, telling
from spike_export.engines.accuracy.distances import Accuracy, distances, log_probabilities
from spike_export.engines.accuracy.predictions import Predictions, record_type
from spike_export.engines.accuracy.reference_cache import ReferenceCache
from spike_export.engines.accuracy.reference_model import predicted, predicted_by
from spike_export.engines.onnx_runtime.session import BundleSession, open_bundle

LoadModel = Callable[[], Decoder]
"""Gives the reference model; whoever calls it may drop it when done."""

Run = Callable[[NDArray[np.int64], tuple[int, ...], Progress], Iterator[Predictions]]
"""Yields the reference model's predictions of each window behind a prefix."""


@dataclass(frozen=True)
class Reference:
    """The reference model's predictions of every window, mapped from the disk.

    Attributes:
        content: [windows, tokens] int64.
        rows: [windows, tokens - 1] records, of all positions that predict content.
        first: Number of the first window.
    """

    content: NDArray[np.int64]
    rows: Predictions
    first: int = 0

    def window(self, index: int) -> Predictions:
        """Return one window's predictions."""
        rows: Predictions = self.rows[index]
        return rows

    def part(self, rows: slice) -> "Reference":
        """Return some of the windows, in memory."""
        return Reference(self.content[rows], np.array(self.rows[rows]), self.first + rows.start)

    @cached_property
    def perplexity(self) -> float:
        """Of the reference."""
        negative = sum(-float(log_probabilities(rows, "target").sum()) for rows in self.rows)
        return Likelihood(negative, self.rows.size).perplexity


@contextmanager
def references(
    load: LoadModel,
    wanted: Sequence[tuple[NDArray[np.int64], tuple[int, ...]]],
    bos: int | None,
    progress: Progress = silent,
    scratch: Path | None = None,
    cache: ReferenceCache | None = None,
    workers: Workers | None = None,
) -> Iterator[tuple[Reference, ...]]:
    """Run the reference model over windows [windows, tokens] behind prefixes, and keep its predictions for the block.

    What the cache has is read from there, and what is computed stays there. The model is let go before the block
    begins: the variants need the memory.

    Args:
        load: Gives the model.
        wanted: Pairs of windows and the prefix before each of them.
        bos: Fed before each window, unless the prefix has it.
        progress: Told after each window.
        scratch: Existing folder for predictions that no cache takes; the system's temporary folder by default.
        cache: Of earlier checks; None to keep nothing.
        workers: Processes that run the model; None to do it here.

    Raises:
        ArtifactError: The disk has too little room.
        CalibrationError: One of the processes failed.
    """
    with tempfile.TemporaryDirectory(prefix="spike-export-", dir=scratch) as name:
        model = load()
        store = _Store(Path(name), cache, record_type(model.config.vocab_size))
        run: Run = partial(predicted, model, bos) if workers is None else partial(predicted_by, workers)
        found = tuple(_reference(run, store, content, bos, prefix, progress) for content, prefix in wanted)
        del model, run
        collect_and_return_memory()
        yield found


@dataclass(frozen=True)
class _Store:
    """Where predictions go: into the cache where it has room, else into a folder that lives as long as the check."""

    folder: Path
    cache: ReferenceCache | None
    record: np.dtype[np.void]

    def read(self, content: NDArray[np.int64], prefix: Sequence[int], bos: int | None) -> Predictions | None:
        if self.cache is None:
            return None
        return self.cache.read(self.cache.file(content, prefix, bos), self.record, _shape(content))

    def write(
        self, content: NDArray[np.int64], prefix: Sequence[int], bos: int | None, rows: Iterator[Predictions]
    ) -> Predictions:
        needed = math.prod(_shape(content)) * self.record.itemsize
        kept = self.cache is not None and self.cache.place(needed)
        file = self.cache.file(content, prefix, bos) if self.cache is not None and kept else None
        partial = (self.folder if file is None else file.parent) / f".{token_hex(8)}.partial"
        require_free_space(partial, needed, "the reference's predictions")
        try:
            _write(partial, rows, self.record, _shape(content))
            found: Predictions = np.load(partial, mmap_mode="r")
            if file is not None:
                partial.replace(file)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise ArtifactError(describe_os_error(error, partial.parent)) from error
        return found


def _shape(content: NDArray[np.int64]) -> tuple[int, int]:
    return content.shape[0], content.shape[1] - 1


def _write(file: Path, rows: Iterator[Predictions], record: np.dtype[np.void], shape: tuple[int, int]) -> None:
    """Write an array window by window, and a seal behind it: mapped memory could not tell of a full disk."""
    header = {"descr": np.lib.format.dtype_to_descr(record), "fortran_order": False, "shape": shape}
    start, seal = io.BytesIO(), hashlib.sha256()
    np.lib.format.write_array_header_2_0(start, header)
    with file.open("wb") as stream:
        for part in chain([start.getvalue()], (each.tobytes() for each in rows)):
            seal.update(part)
            stream.write(part)
        stream.write(seal.digest())


def _reference(
    run: Run,
    store: _Store,
    content: NDArray[np.int64],
    bos: int | None,
    prefix: tuple[int, ...],
    progress: Progress,
) -> Reference:
    found = store.read(content, prefix, bos)
    if found is None:
        return Reference(content, store.write(content, prefix, bos, run(content, prefix, progress)))
    for index in range(len(content)):
        progress("windows", index + 1, len(content))
    return Reference(content, found)


def compare(session: BundleSession, reference: Reference, progress: Progress = silent) -> Accuracy:
    """Run a bundle over the reference's windows, one window per call.

    Raises:
        EngineError: The bundle yields a value that is not finite.
    """
    windows = []
    for index, tokens in enumerate(reference.content):
        logits = session.prefill(tokens[None])[0, :-1]
        if not np.isfinite(logits).all():
            raise EngineError(
                f"the bundle's logits are not finite in evaluation window {reference.first + index}: a value "
                "overflowed; from float16, export again with --dtype bfloat16"
            )
        windows.append(distances(reference.window(index), logits, tokens[1:]))
        progress("windows", index + 1, len(reference.content))
    return Accuracy(tuple(windows))


def compare_by(workers: Workers, bundle: Path, reference: Reference, progress: Progress = silent) -> Accuracy:
    """Return the same, found by the processes of a cluster, which read the bundle where this process does.

    Raises:
        CalibrationError: A process failed, or finds another bundle there; names its machine.
    """
    parts, place = even_parts(len(reference.content), workers.count), bundle.resolve()
    manifest = load_manifest(place)
    calls = [(place, manifest, reference.part(rows)) for rows in parts]
    found = workers.results(_compared_here, calls, telling(progress, "windows", parts))
    return Accuracy(tuple(chain.from_iterable(each.windows for each in found)))


def _compared_here(calibration: Calibration, bundle: Path, manifest: Manifest, reference: Reference) -> Accuracy:
    """Compare in a worker; its calibration lets go of the weights, for whose memory the bundle has a use.

    Raises:
        ArtifactError: No bundle is there, or another one.
    """
    if load_manifest(bundle) != manifest:
        raise ArtifactError(f"{bundle}: another bundle lies here; let all machines share its folder")
    calibration.forget()
    return compare(open_bundle(bundle, all_logits=True), reference)
