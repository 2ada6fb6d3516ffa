"""95 % intervals over windows cover the truth as often as they say, and pairing makes them narrow."""

import numpy as np
import pytest
from numpy.typing import NDArray

from spike_export.engines.accuracy.distances import Accuracy, Distances
from spike_export.engines.accuracy.intervals import Interval, students_t

WINDOWS, POSITIONS, DRAWS = 8, 100, 1000


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.706), (2, 4.303), (4, 2.776), (5, 2.571), (7, 2.365), (31, 2.040), (10**6, 1.960)]
)
def test_quantiles_are_those_of_tables(freedom: int, quantile: float) -> None:
    assert students_t(freedom) == pytest.approx(quantile, abs=0.01)


def test_the_interval_of_a_mean_is_students() -> None:
    found = Interval.of(np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    assert found.mean == 3.5
    assert found.margin == pytest.approx(2.571 * 1.8708 / 6**0.5, rel=0.005)
    assert Interval.of(np.array([2.0])) == Interval(2.0, 0.0)


def test_an_increase_follows_from_logarithms() -> None:
    found = Interval(np.log(1.25), 0.01).as_increase
    assert found.mean == pytest.approx(0.25)
    assert found.margin == pytest.approx(0.0125)
    assert Interval(1e4, 1.0).as_increase == Interval(np.inf, np.inf)


def windows(losses: NDArray[np.float64], reference: NDArray[np.float64]) -> Accuracy:
    """Windows of which only the text's probabilities matter; losses are [windows, positions]."""
    divergence, same = np.zeros(losses.shape[1]), np.ones(losses.shape[1], np.bool_)
    pairs = zip(losses, reference, strict=True)
    return Accuracy(tuple(Distances(own, theirs, divergence, same, same) for own, theirs in pairs))


def test_intervals_cover_the_truth_in_95_of_100_draws() -> None:
    # A text's difficulty differs from window to window far more than the cost; the cost of a window varies too.
    random = np.random.default_rng(0)
    cost, covered = 0.01, 0
    for _ in range(DRAWS):
        reference = random.gamma(2.0, 1.2, (WINDOWS, POSITIONS)) + random.normal(0, 0.5, (WINDOWS, 1))
        added = random.normal(cost, 0.2, reference.shape) + random.normal(0, 0.01, (WINDOWS, 1))
        found = windows(reference + added, reference).increase
        covered += abs(found.mean - np.expm1(cost)) <= found.margin
    assert covered / DRAWS == pytest.approx(0.95, abs=0.02)


def test_a_shuffled_pairing_is_noticed() -> None:
    random = np.random.default_rng(1)
    reference = random.gamma(2.0, 1.2, (WINDOWS, POSITIONS)) + random.normal(0, 0.5, (WINDOWS, 1))
    losses = reference + random.normal(0.01, 0.02, reference.shape)
    paired, shuffled = windows(losses, reference).increase, windows(np.roll(losses, 1, axis=0), reference).increase
    assert shuffled.margin > 10 * paired.margin
