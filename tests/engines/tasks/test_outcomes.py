"""Statistics of paired answers: McNemar's test against all coin tosses, and the coverage of both intervals."""

from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from spike_export.engines.tasks.outcomes import Outcomes


def paired(both: int, lost: int, gained: int, neither: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    bundle = np.repeat([True, False, True, False], [both, lost, gained, neither])
    return bundle, np.repeat([True, True, False, False], [both, lost, gained, neither])


def test_answers_are_counted_in_pairs() -> None:
    found = Outcomes.of(*paired(5, 3, 1, 2))
    assert found == Outcomes(both=5, lost=3, gained=1, neither=2)
    assert (found.items, found.accuracy, found.reference_accuracy) == (11, 6 / 11, 8 / 11)
    assert found.difference == pytest.approx(found.accuracy - found.reference_accuracy)
    assert found.flips == 4 / 11


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (4, 4), (2, 7), (9, 1)])
def test_mcnemars_p_is_the_share_of_coin_tosses_that_are_as_uneven(lost: int, gained: int) -> None:
    tosses = [sum(toss) for toss in product((0, 1), repeat=lost + gained)]
    uneven = abs(lost - gained)
    expected = sum(abs(2 * heads - lost - gained) >= uneven for heads in tosses) / len(tosses)
    assert Outcomes(50, lost, gained, 20).p_value == pytest.approx(expected)


def test_many_flips_do_not_overflow() -> None:
    assert Outcomes(0, 4000, 4000, 0).p_value == 1.0
    assert 0 < Outcomes(0, 4200, 3800, 0).p_value < 1e-4


@pytest.mark.parametrize("items", [60, 1000])
def test_the_intervals_cover_the_truth_in_95_percent_of_draws(items: int) -> None:
    """Both: 1,000 draws with a known share of flips; an interval of twice or half the width would fail."""
    shares = np.array([0.6, 0.07, 0.03, 0.3])
    drawn = [Outcomes(*map(int, row)) for row in np.random.default_rng(0).multinomial(items, shares, 1000)]
    truths = {"difference_interval": shares[2] - shares[1], "flips_interval": shares[1] + shares[2]}
    for name, truth in truths.items():
        covered = np.mean([low <= truth <= high for low, high in (getattr(each, name) for each in drawn)])
        assert 0.93 <= covered <= 0.97 + 0.01 * (items < 100), (name, covered)


def test_a_task_without_flips_has_an_interval() -> None:
    low, high = Outcomes(12, 0, 0, 8).difference_interval
    assert low == -high < -0.05
    assert Outcomes(12, 0, 0, 8).flips_interval[0] == 0
    assert Outcomes(12, 0, 0, 8).flips_interval[1] > 0.1


def test_a_shuffled_pairing_is_noticed() -> None:
    """The accuracies stay; flips and the paired interval do not."""
    bundle, reference = paired(600, 12, 9, 379)
    shuffled = Outcomes.of(np.random.default_rng(0).permutation(bundle), reference)
    sound = Outcomes.of(bundle, reference)
    assert (shuffled.accuracy, shuffled.reference_accuracy) == (sound.accuracy, sound.reference_accuracy)
    assert shuffled.flips > 10 * sound.flips
    widths = [high - low for low, high in (sound.difference_interval, shuffled.difference_interval)]
    assert widths[1] > 3 * widths[0]
