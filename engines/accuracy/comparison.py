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
from spike_export.engines.onnx_runtime.session import BundleSession

Logits = NDArray[np.float32]

LoadModel = Callable[[], Decoder]
"""Gives the reference model; whoever calls it may drop it when done."""

_ROWS = 64
"""Positions compared at once: a few vocabulary rows in float64 would otherwise take hundreds of MB."""


@dataclass(frozen=True)
class ReferenceLogits:
    """The reference model's logits of every window, on the disk: all windows' would not fit into memory.

    Attributes:
        content: [windows, tokens] int64.
        folder: Holds one `N.npy` per window: [tokens - 1, vocab] float32, of all positions that predict content.
        perplexity: Of the reference.
        behind_prefix: Of the reference behind the prefix that it was given, or None.
    """

    content: NDArray[np.int64]
    folder: Path
    perplexity: float
    behind_prefix: float | None = None

    def window(self, index: int) -> Logits:
        """Return one window's logits, mapped from the disk."""
        logits: Logits = np.load(self.folder / f"{index}.npy", mmap_mode="r")
        return logits


@dataclass(frozen=True, slots=True)
class Accuracy:
    """One bundle against the reference.

    Attributes:
        top1_agreement: Share of positions with the same most likely token.
        kl_divergence: KL(reference || bundle), mean over positions, in nats.
    """

    perplexity: float
    top1_agreement: float
    kl_divergence: float


@contextmanager
def reference_logits(
    load: LoadModel,
    content: NDArray[np.int64],
    bos: int | None,
    progress: Progress = silent,
    scratch: Path | None = None,
    prefix: Sequence[int] = (),
) -> Iterator[ReferenceLogits]:
    """Run the reference model over the windows and keep its logits in a temporary folder for the block.

    The model is let go before the block begins: the variants need the memory. `scratch` is an existing folder to keep
    the logits in; the system's temporary folder by default. With a `prefix` the perplexity behind it is taken too.

    Raises:
        ArtifactError: The temporary folder's disk has too little room.
    """
    with tempfile.TemporaryDirectory(prefix="spike-export-", dir=scratch) as name:
        total, behind = _write_logits(load(), content, bos, Path(name), progress, prefix)
        collect_and_return_memory()
        yield ReferenceLogits(content, Path(name), total.perplexity, behind)


def _write_logits(
    model: Decoder,
    content: NDArray[np.int64],
    bos: int | None,
    folder: Path,
    progress: Progress,
    prefix: Sequence[int],
) -> tuple[Likelihood, float | None]:
    needed = content.shape[0] * (content.shape[1] - 1) * model.config.vocab_size * 4
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ArtifactError(f"{folder}: {needed:,} bytes are needed and {free:,} are free; free space there")
    total = Likelihood(0.0, 0)
    for index, logits in enumerate(_window_logits(model, content, bos)):
        try:
            np.save(folder / f"{index}.npy", logits)
        except OSError as error:
            raise ArtifactError(describe_os_error(error, folder)) from error
        total += likelihood(logits, content[index, 1:])
        progress("reference windows", index + 1, len(content))
    if not prefix:
        return total, None
    behind = Likelihood(0.0, 0)
    for index, logits in enumerate(_window_logits(model, content, bos, prefix)):
        behind += likelihood(logits, content[index, 1:])
    return total, behind.perplexity


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
    total = Likelihood(0.0, 0)
    agreeing, divergence = 0, 0.0
    for index, tokens in enumerate(reference.content):
        logits = session.prefill(tokens[None])[0, :-1]
        if not np.isfinite(logits).all():
            raise EngineError(
                f"the bundle's logits are not finite in evaluation window {index}: a value overflowed; from float16, "
                "export again with --dtype bfloat16"
            )
        expected = reference.window(index)
        total += likelihood(logits, tokens[1:])
        agreeing += int((logits.argmax(axis=1) == expected.argmax(axis=1)).sum())
        divergence += kl_divergence(expected, logits)
        progress("windows", index + 1, len(reference.content))
    return Accuracy(total.perplexity, agreeing / total.tokens, divergence / total.tokens)


def likelihood(logits: Logits, targets: NDArray[np.int64]) -> Likelihood:
    """Return the negative log-likelihood of `targets` [positions] under `logits` [positions, vocab]."""
    negative = 0.0
    for start in range(0, len(targets), _ROWS):
        rows = log_softmax(logits[start : start + _ROWS])
        negative -= float(np.take_along_axis(rows, targets[start : start + _ROWS, None], axis=1).sum())
    return Likelihood(negative, len(targets))


def kl_divergence(reference: Logits, logits: Logits) -> float:
    """Return the sum over positions of KL(softmax(reference) || softmax(logits)) in nats."""
    total = 0.0
    for start in range(0, len(logits), _ROWS):
        expected, actual = (log_softmax(part[start : start + _ROWS]) for part in (reference, logits))
        np.subtract(expected, actual, out=actual)
        total += float(np.multiply(np.exp(expected, out=expected), actual, out=actual).sum())
    return total


def log_softmax(logits: Logits) -> NDArray[np.float64]:
    """Return log-probabilities over the last axis, in float64."""
    rows = logits.astype(np.float64)
    rows -= rows.max(axis=-1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(axis=-1, keepdims=True))
    return rows
