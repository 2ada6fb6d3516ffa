"""Log-likelihoods of continuations: of a bundle in ONNX Runtime, and of the unquantized model in torch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.errors import EngineError
from spike_export.artifacts.progress import Progress, silent
from spike_export.calibration.decoder.activations import Activations
from spike_export.calibration.decoder.layerwise import BATCH_TOKENS, Decoder, Head
from spike_export.engines.accuracy.predictions import Logits, log_softmax
from spike_export.engines.onnx_runtime.denormals import denormals_flushed
from spike_export.engines.onnx_runtime.sequences import run_failure
from spike_export.engines.onnx_runtime.session import BundleSession
from spike_export.engines.onnx_runtime.taps import fresh_feeds
from spike_export.engines.tasks.token_rows import Request, TokenRows

_LOGITS_BYTES = 1 << 28
"""Largest array of one call: the logits of a long vocabulary."""

Batches = Sequence[NDArray[np.int64]]
"""Fresh sequences [rows, tokens] each, padded on the right; BOS is among the tokens where the prefix holds none."""

BatchLogits = Callable[[int, slice], Logits]
"""Row of a batch, tokens of the row → the logits [tokens, vocab] behind them."""

Model = Callable[[Batches], Iterator[BatchLogits]]
"""Yields the logits of one batch after the other."""


@dataclass(frozen=True, slots=True)
class ContinuationScore:
    """What a model says of a continuation.

    Attributes:
        log_probability: Of the continuation behind its context, in nats.
        greedy: Whether each token of the continuation is the most likely one.
    """

    log_probability: float
    greedy: bool


def score_continuations(model: Model, requests: Sequence[Request], vocabulary: int) -> list[ContinuationScore]:
    """Return what a model says of each continuation; padding and order change nothing but the last digits.

    Args:
        model: Gives the logits.
        requests: Continuations with their contexts.
        vocabulary: Logits of a token.

    Raises:
        EngineError: The model fails, or gives a logit that is not finite.
    """
    rows = TokenRows.of(requests)
    batches = rows.batches(min(BATCH_TOKENS, _LOGITS_BYTES // (4 * vocabulary)))
    scores: dict[int, ContinuationScore] = {}
    first = 0
    for batch, logits in zip(batches, model(batches), strict=True):
        for row in range(len(batch)):
            for index in rows.requests_of[first + row]:
                request = requests[index]
                scores[index] = _score(logits(row, request.positions), request.continuation)
        first += len(batch)
    return [scores[index] for index in range(len(requests))]


def _score(logits: Logits, continuation: Sequence[int]) -> ContinuationScore:
    if not np.isfinite(logits).all():
        raise EngineError(
            "logits are not finite: a value overflowed; from float16, export the bundle again with --dtype bfloat16"
        )
    rows, tokens = log_softmax(logits), np.array(continuation)
    chosen = rows[np.arange(len(tokens)), tokens]
    return ContinuationScore(float(chosen.sum()), bool((rows.argmax(axis=1) == tokens).all()))


def bundle_model(session: BundleSession, progress: Progress = silent) -> Model:
    """Return a bundle as a model; `session` gives all logits.

    `progress` is told after each batch.
    """

    def logits(batches: Batches) -> Iterator[BatchLogits]:
        for index, batch in enumerate(batches):
            try:
                with denormals_flushed():
                    found = session.session.run(["logits"], fresh_feeds(session, batch))[0]
            except Exception as error:  # ONNX Runtime's exceptions have no common type
                raise run_failure(error, batch.shape[1]) from error
            progress("batches", index + 1, len(batches))
            yield partial(_of_row, found)

    return logits


def decoder_model(decoder: Decoder, prefix: Sequence[int], progress: Progress = silent) -> Model:
    """Return the unquantized model behind a prefix as a model; all batches pass one layer after the other.

    `progress` is told after each layer.
    """

    def logits(batches: Batches) -> Iterator[BatchLogits]:
        states, head = _last_states(decoder, batches, prefix, progress), decoder.head()
        for index in range(len(batches)):
            yield partial(_of_states, head, states, index)

    return logits


def _of_row(found: Logits, row: int, tokens: slice) -> Logits:
    return found[row, tokens]


def _of_states(head: Head, states: Activations, batch: int, row: int, tokens: slice) -> Logits:
    """Return the logits of some tokens of a row; those of all rows would be many times the states."""
    logits: Logits = head.logits(states.get(batch)[row, tokens]).float().cpu().numpy()
    return logits


def _last_states(decoder: Decoder, batches: Batches, prefix: Sequence[int], progress: Progress) -> Activations:
    """Return the last layer's output; unlike those of `Decoder.run`, the batches are of different lengths."""
    import torch

    device, count = decoder.execution.devices[0], decoder.config.num_hidden_layers
    contexts = {length: decoder.contexts(length, len(prefix)) for length in {batch.shape[1] for batch in batches}}
    with torch.inference_mode():
        states = decoder.first_states(batches)
        for index, layer, told in decoder.layers_in_turn(1, prefix, count):
            for part, batch in enumerate(batches):
                context = replace(contexts[batch.shape[1]][index], past=told.past).to(device)
                states.put(part, layer(states.get(part, device), context))
            progress("layers", index + 1, count)
    return states
