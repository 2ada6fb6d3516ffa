"""How close a bundle's next-token distributions are to the reference model's, on evaluation windows."""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.atomic_write import describe_os_error
from spike_export.artifacts.errors import ArtifactError, EngineError
from spike_export.artifacts.progress import Progress, silent
from spike_export.calibration.decoder.heap import collect_and_return_memory
from spike_export.calibration.decoder.layerwise import Decoder
from spike_export.calibration.decoder.perplexity import Likelihood, with_bos
from spike_export.engines.accuracy.distances import Accuracy, Logits, distances, likelihood
from spike_export.engines.onnx_runtime.session import BundleSession

LoadModel = Callable[[], Decoder]
"""Gives the reference model; whoever calls it may drop it when done."""


@dataclass(frozen=True)
class ReferenceLogits:
    """The reference model's logits of every window, on the disk: all windows' would not fit into memory.

    Attributes:
        content: [windows, tokens] int64.
        folder: Holds one `N.npy` per window: [tokens - 1, vocab] float32, of all positions that predict content.
        perplexity: Of the reference.
    """

    content: NDArray[np.int64]
    folder: Path
    perplexity: float

    def window(self, index: int) -> Logits:
        """Return one window's logits, mapped from the disk."""
        logits: Logits = np.load(self.folder / f"{index}.npy", mmap_mode="r")
        return logits


@contextmanager
def reference_logits(
    load: LoadModel,
    wanted: Sequence[tuple[NDArray[np.int64], tuple[int, ...]]],
    bos: int | None,
    progress: Progress = silent,
    scratch: Path | None = None,
) -> Iterator[tuple[ReferenceLogits, ...]]:
    """Run the reference model over windows [windows, tokens] behind prefixes, and keep its logits for the block.

    The model is let go before the block begins: the variants need the memory.

    Args:
        load: Gives the model.
        wanted: Pairs of windows and the prefix before each of them.
        bos: Fed before each window, unless the prefix has it.
        progress: Told after each window.
        scratch: Existing folder to keep the logits in; the system's temporary folder by default.

    Raises:
        ArtifactError: The temporary folder's disk has too little room.
    """
    with tempfile.TemporaryDirectory(prefix="spike-export-", dir=scratch) as name:
        model, folder = load(), Path(name)
        positions = sum(content.shape[0] * (content.shape[1] - 1) for content, _ in wanted)
        _require_room(folder, positions * model.config.vocab_size * 4)
        found = tuple(
            _written(model, content, bos, folder / str(index), progress, prefix)
            for index, (content, prefix) in enumerate(wanted)
        )
        del model
        collect_and_return_memory()
        yield found


def _require_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ArtifactError(f"{folder}: {needed:,} bytes are needed and {free:,} are free; free space there")


def _written(
    model: Decoder,
    content: NDArray[np.int64],
    bos: int | None,
    folder: Path,
    progress: Progress,
    prefix: Sequence[int],
) -> ReferenceLogits:
    total = Likelihood(0.0, 0)
    folder.mkdir()
    for index, logits in enumerate(_window_logits(model, content, bos, prefix)):
        try:
            np.save(folder / f"{index}.npy", logits)
        except OSError as error:
            raise ArtifactError(describe_os_error(error, folder)) from error
        total += likelihood(logits, content[index, 1:])
        progress("windows", index + 1, len(content))
    return ReferenceLogits(content, folder, total.perplexity)


def _window_logits(
    model: Decoder, content: NDArray[np.int64], bos: int | None, prefix: Sequence[int] = ()
) -> Iterator[Logits]:
    """Yield each window's logits [tokens - 1, vocab] of the positions that predict content, one window per call."""
    states = model.run(content if bos in prefix else with_bos(content, bos), prefix, batch_tokens=1)
    head = model.head()
    for index in range(len(content)):
        yield head.logits(states.get(index)[0, -content.shape[1] : -1]).float().cpu().numpy()


def compare(session: BundleSession, reference: ReferenceLogits, progress: Progress = silent) -> Accuracy:
    """Run a bundle over the reference's windows, one window per call.

    Raises:
        EngineError: The bundle yields a value that is not finite.
    """
    windows = []
    for index, tokens in enumerate(reference.content):
        logits = session.prefill(tokens[None])[0, :-1]
        if not np.isfinite(logits).all():
            raise EngineError(
                f"the bundle's logits are not finite in evaluation window {index}: a value overflowed; from float16, "
                "export again with --dtype bfloat16"
            )
        windows.append(distances(reference.window(index), logits, tokens[1:]))
        progress("windows", index + 1, len(reference.content))
    return Accuracy(tuple(windows))
