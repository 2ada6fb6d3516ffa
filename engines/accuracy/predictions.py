"""What a check keeps of a model's next-token distributions: the likeliest tokens, and a sample of all others.

Every figure of a check follows from it. The likeliest tokens, the text's token and the sum over all tokens are exact.
Of the divergence, only the part within the others is estimated, without bias (`distances`).
"""

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]
Floats = NDArray[np.float64]

Predictions = NDArray[np.void]
"""[positions] records of `record_type`; each predicts one token of the text."""

KEPT = 1024
"""Likeliest tokens of a position that are kept."""

SAMPLES = 64
"""Tokens that stand for all others; none where all are kept."""

ROWS = 64
"""Positions computed at once: a few vocabulary rows in float64 would otherwise take hundreds of MB."""


def record_type(vocabulary: int, kept: int = KEPT) -> np.dtype[np.void]:
    """Return the record of one position.

    Fields:
        best: The likeliest token; the first of several.
        tokens, logits: [kept], the likeliest tokens, in no order.
        others, other_logits: [samples], tokens drawn from all others by their probabilities.
        top: Largest logit.
        log_sum: ln of the sum of exp(logit - top) over all tokens.
        log_rest: ln of the probability of all others together.
        target: Logit of the text's token.
    """
    samples = SAMPLES if vocabulary > kept else 0
    kept = min(kept, vocabulary)
    return np.dtype(
        [
            ("best", "<i4"),
            ("tokens", "<i4", (kept,)),
            ("logits", "<f4", (kept,)),
            ("others", "<i4", (samples,)),
            ("other_logits", "<f4", (samples,)),
            ("top", "<f4"),
            ("log_sum", "<f8"),
            ("log_rest", "<f8"),
            ("target", "<f4"),
        ]
    )


def predictions(logits: Logits, targets: NDArray[np.int64], kept: int = KEPT, seed: int = 0) -> Predictions:
    """Return what is kept of logits [positions, vocab] that predict `targets` [positions].

    Args:
        logits: Of the model.
        targets: The text.
        kept: Likeliest tokens to keep; all of a smaller vocabulary.
        seed: Draws the sample of the others.
    """
    found, random = np.empty(len(targets), record_type(logits.shape[1], kept)), np.random.default_rng(seed)
    for start in range(0, len(targets), ROWS):
        rows = slice(start, start + ROWS)
        _fill(found[rows], logits[rows], targets[rows], random)
    return found


def _fill(found: Predictions, logits: Logits, targets: NDArray[np.int64], random: np.random.Generator) -> None:
    values = log_softmax(logits)
    best = logits.argmax(axis=1)
    found["best"] = best
    found["top"] = np.take_along_axis(logits, best[:, None], axis=1)[:, 0]
    found["log_sum"] = -np.take_along_axis(values, best[:, None], axis=1)[:, 0]
    found["target"] = np.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    kept = found["tokens"].shape[1]
    found["tokens"] = np.argpartition(logits, -kept, axis=1)[:, -kept:]
    found["logits"] = np.take_along_axis(logits, found["tokens"], axis=1)
    found["log_rest"] = -np.inf
    if found["others"].shape[1]:
        found["log_rest"] = log_rest(values, found["tokens"])  # leaves the others alone in `values`
        found["others"] = _drawn(values, found["others"].shape[1], random)
        found["other_logits"] = np.take_along_axis(logits, found["others"], axis=1)


def log_softmax(logits: Logits) -> Floats:
    """Return log-probabilities over the last axis, in float64."""
    rows = logits.astype(np.float64)
    rows -= rows.max(axis=-1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(axis=-1, keepdims=True))
    return rows


def log_rest(values: Floats, tokens: NDArray[np.int32]) -> Floats:
    """Return ln of the probability [rows] of all but some tokens [rows, kept], whose log-probabilities become -inf.

    Args:
        values: [rows, vocab] log-probabilities, changed in place.
        tokens: Not all of the vocabulary.
    """
    np.put_along_axis(values, tokens, -np.inf, axis=1)
    top: Floats = values.max(axis=1)
    total: Floats = np.log(np.exp(values - top[:, None]).sum(axis=1))
    return top + total


def _drawn(values: Floats, count: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Return tokens [rows, count] drawn from log-weights [rows, vocab], systematically: in even steps of probability.

    Systematic sampling has the means of independent draws and a smaller variance (Madow and Madow, 1944).
    """
    sums = np.cumsum(np.exp(values - values.max(axis=1, keepdims=True)), axis=1)
    places = (np.arange(count) + random.random((len(values), 1))) / count
    rows = zip(sums, places * sums[:, -1:], strict=True)
    # The last sum may be rounded below what is looked for, and the tokens behind the last one with a weight are none.
    last = [np.searchsorted(row, row[-1]) for row in sums]
    found = np.stack([np.searchsorted(row, wanted, side="right") for row, wanted in rows])
    tokens: NDArray[np.int64] = np.minimum(found, np.array(last)[:, None])
    return tokens
