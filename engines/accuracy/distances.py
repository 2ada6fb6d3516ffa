"""How far a model's next-token distributions are from the reference's: position by position, and summed up."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from spike_export.calibration.decoder.perplexity import Likelihood
from spike_export.engines.accuracy.intervals import Interval
from spike_export.engines.accuracy.predictions import ROWS, Floats, Logits, Predictions, log_rest, log_softmax

FIRST = 5
"""Most likely tokens of the model among which the reference's most likely one is looked for."""


@dataclass(frozen=True)
class Distances:
    """One window's positions, each the prediction of one token of the text.

    Attributes:
        negative: [positions] float64, -ln of the probability that the model gives the text's token.
        reference_negative: [positions] float64, the same of the reference.
        divergence: [positions] float64, KL(reference || model) in nats.
        same_best: [positions] bool, whether both have the same most likely token.
        best_among_first: [positions] bool, whether the reference's most likely token is among the model's `FIRST`.
    """

    negative: Floats
    reference_negative: Floats
    divergence: Floats
    same_best: NDArray[np.bool_]
    best_among_first: NDArray[np.bool_]


@dataclass(frozen=True)
class Accuracy:
    """A model against the reference, on windows of equal length.

    Intervals are of the mean over windows; those of differences are paired, because both models read the same text.
    """

    windows: tuple[Distances, ...]

    @property
    def perplexity(self) -> float:
        """Of the model, over all windows."""
        return Likelihood(float(self._all("negative").sum()), len(self._all("negative"))).perplexity

    @property
    def increase(self) -> Interval:
        """Relative increase of the perplexity over the reference's."""
        return self._over_windows(self._all("negative") - self._all("reference_negative")).as_increase

    @property
    def losses(self) -> tuple[float, ...]:
        """Mean negative log-likelihood of each window under the model, in nats."""
        return tuple(float(window.negative.mean()) for window in self.windows)

    def at(self, positions: slice) -> "Accuracy":
        """Return the same of some positions of each window alone."""
        names = Distances.__dataclass_fields__
        parts = ({name: getattr(window, name)[positions] for name in names} for window in self.windows)
        return Accuracy(tuple(Distances(**part) for part in parts))

    @property
    def divergence(self) -> Interval:
        """KL(reference || model), mean over positions, in nats."""
        return self._over_windows(self._all("divergence"))

    @property
    def top1_agreement(self) -> Interval:
        """Share of positions with the same most likely token."""
        return self._over_windows(self._all("same_best"))

    @property
    def top5_agreement(self) -> Interval:
        """Share of positions whose most likely token of the reference is among the model's five."""
        return self._over_windows(self._all("best_among_first"))

    @property
    def probability_error(self) -> float:
        """Root mean square of the difference of the probabilities that the two give the text's tokens."""
        difference = np.exp(-self._all("negative")) - np.exp(-self._all("reference_negative"))
        return float(np.sqrt(np.square(difference).mean()))

    def divergence_quantile(self, share: float) -> float:
        """Return the divergence that a share of the positions does not exceed; 1 for the largest."""
        return float(np.quantile(self._all("divergence"), share))

    def worst(self, count: int) -> list[tuple[int, int, float]]:
        """Return (window, position, divergence) of the positions that diverge most, largest first."""
        divergence = np.stack([window.divergence for window in self.windows])
        order = np.argsort(-divergence, axis=None, kind="stable")[:count]
        places = [divmod(int(flat), divergence.shape[1]) for flat in order]
        return [(window, position, float(divergence[window, position])) for window, position in places]

    @cached_property
    def _joined(self) -> Distances:
        return joined(self.windows)

    def _all(self, name: str) -> Floats:
        return np.asarray(getattr(self._joined, name), np.float64)

    def _over_windows(self, values: Floats) -> Interval:
        return Interval.of(values.reshape(len(self.windows), -1).mean(axis=1))


def distances(reference: Predictions, logits: Logits, targets: NDArray[np.int64]) -> Distances:
    """Compare a window's logits [positions, vocab] with what was kept of the reference's; `targets` is the text.

    The divergence is exact over the kept tokens and their common rest. Within the rest, whose share of the probability
    is r, it is r times the mean over the sampled tokens of q/p - 1 - ln(q/p), p and q being the two models'
    probabilities given the rest: the mean has no bias, no term is negative, and each is of the second order of the
    models' difference.
    Source: J. Schulman, Approximating KL divergence, 2020, estimator k3.
    """
    parts = [slice(start, start + ROWS) for start in range(0, len(targets), ROWS)]
    return joined([_distances(reference[rows], logits[rows], targets[rows]) for rows in parts])


def joined(parts: Sequence[Distances]) -> Distances:
    """Return the distances of consecutive parts of a window as one."""
    names = Distances.__dataclass_fields__
    return Distances(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def _distances(reference: Predictions, logits: Logits, targets: NDArray[np.int64]) -> Distances:
    actual = log_softmax(logits)
    best = reference["best"].astype(np.int64)
    of_best = np.take_along_axis(actual, best[:, None], axis=1)
    negative = -np.take_along_axis(actual, targets[:, None], axis=1)[:, 0]
    same, among = actual.argmax(axis=1) == best, (actual > of_best).sum(axis=1) < FIRST
    divergence = _divergence(reference, actual)  # changes `actual`
    return Distances(negative, -log_probabilities(reference, "target"), divergence, same, among)


def _divergence(reference: Predictions, actual: Floats) -> Floats:
    """Return KL(reference || model) [positions] in nats; the model's log-probabilities are changed in place."""
    expected = log_probabilities(reference, "logits")
    of_kept = np.take_along_axis(actual, reference["tokens"], axis=1)
    divergence: Floats = (np.exp(expected) * (expected - of_kept)).sum(axis=1)
    if not reference["others"].shape[1]:
        return divergence
    of_others = np.take_along_axis(actual, reference["others"], axis=1)
    rest, of_rest = reference["log_rest"], log_rest(actual, reference["tokens"])
    given = log_probabilities(reference, "other_logits") - rest[:, None]
    ratio = of_others - of_rest[:, None] - given
    within: Floats = (np.expm1(ratio) - ratio).mean(axis=1)
    divergence += np.exp(rest) * (rest - of_rest + within)
    return divergence


def log_probabilities(reference: Predictions, field: str) -> Floats:
    """Return the log-probabilities that belong to a field of kept logits, in float64."""
    logits = reference[field].astype(np.float64)
    shape = (-1, *[1] * (logits.ndim - 1))
    values: Floats = logits - reference["top"].astype(np.float64).reshape(shape)
    values -= reference["log_sum"].reshape(shape)
    return values


def likelihood(logits: Logits, targets: NDArray[np.int64]) -> Likelihood:
    """Return the negative log-likelihood of `targets` [positions] under `logits` [positions, vocab]."""
    negative = 0.0
    for start in range(0, len(targets), ROWS):
        rows = log_softmax(logits[start : start + ROWS])
        negative -= float(np.take_along_axis(rows, targets[start : start + ROWS, None], axis=1).sum())
    return Likelihood(negative, len(targets))
