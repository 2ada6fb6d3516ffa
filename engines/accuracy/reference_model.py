"""The reference model over windows, one window per call: in this process, or by the processes of a cluster."""

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.progress import Progress, silent
from spike_export.calibration.decoder.layerwise import Decoder
from spike_export.calibration.decoder.perplexity import with_bos
from spike_export.calibration.methods.context import Calibration
from spike_export.calibration.methods.spreading import Workers, even_parts, telling
from spike_export.engines.accuracy.predictions import Logits, Predictions, predictions


def predicted(
    model: Decoder,
    bos: int | None,
    content: NDArray[np.int64],
    prefix: Sequence[int],
    progress: Progress = silent,
    first: int = 0,
) -> Iterator[Predictions]:
    """Yield the model's predictions of each window's content.

    Args:
        model: The reference.
        bos: Fed before each window, unless the prefix has it.
        content: [windows, tokens].
        prefix: Token ids before each window.
        progress: Told after each window.
        first: Number of the first window, which seeds the samples that are kept.
    """
    for index, logits in enumerate(_window_logits(model, content, bos, prefix)):
        yield predictions(logits, content[index, 1:], seed=first + index)
        progress("windows", index + 1, len(content))


def predicted_by(
    workers: Workers, content: NDArray[np.int64], prefix: tuple[int, ...], progress: Progress = silent
) -> Iterator[Predictions]:
    """Yield the same, computed by the processes of a cluster.

    Raises:
        CalibrationError: A process failed; names its machine.
    """
    parts = even_parts(len(content), workers.count)
    calls = [(content[rows], prefix, rows.start) for rows in parts]
    yield from chain.from_iterable(workers.results(_predicted_here, calls, telling(progress, "windows", parts)))


def _predicted_here(
    calibration: Calibration, content: NDArray[np.int64], prefix: tuple[int, ...], first: int
) -> list[Predictions]:
    """Return predictions by the weights of a worker's calibration."""
    bos = calibration.checkpoint.bos_token_id
    return list(predicted(calibration.model.decoder, bos, content, prefix, first=first))


def _window_logits(
    model: Decoder, content: NDArray[np.int64], bos: int | None, prefix: Sequence[int]
) -> Iterator[Logits]:
    """Yield each window's logits [tokens - 1, vocab] of the positions that predict content, one window per call."""
    states = model.run(content if bos in prefix else with_bos(content, bos), prefix, batch_tokens=1)
    head = model.head()
    for index in range(len(content)):
        yield head.logits(states.get(index)[0, -content.shape[1] : -1]).float().cpu().numpy()
