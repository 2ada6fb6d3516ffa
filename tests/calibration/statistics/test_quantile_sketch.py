"""The sketch's quantiles against sorted values, and its sums in any order."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from spike_export.calibration.statistics.quantile_sketch import RELATIVE_ERROR, QuantileSketch

Floats = NDArray[np.float32]

SLACK = 1e-9
"""A value on a bucket's bound may be counted beside it: float64 rounding of a logarithm."""

elements = st.one_of(st.just(0.0), st.floats(0, 2.0**100, width=32), st.sampled_from([1e-44, 1.0, 65504.0]))


def values(min_size: int) -> st.SearchStrategy[Floats]:
    return arrays(np.float32, st.integers(min_size, 60), elements=elements)


def lower_quantile(seen: Floats, share: float) -> float:
    return float(np.sort(seen)[int(np.floor(share * (len(seen) - 1)))])


@settings(deadline=None)
@given(values(1), st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.5, 0.9, 0.99, 0.999, 1.0])))
def test_a_quantile_is_within_the_error(seen: Floats, share: float) -> None:
    exact = lower_quantile(seen, share)
    actual = QuantileSketch.of(seen).quantile(share)
    assert abs(actual - exact) <= RELATIVE_ERROR * exact * (1 + SLACK)


def test_the_error_is_used_up_and_no_more() -> None:
    # Must fail with buckets half or twice as wide.
    exact = np.geomspace(1, 2, 1000, dtype=np.float32)
    errors = [abs(QuantileSketch.of(value[None]).quantile(0.5) / float(value) - 1) for value in exact]
    assert 0.98 * RELATIVE_ERROR < max(errors) <= RELATIVE_ERROR * (1 + SLACK)


@settings(deadline=None)
@given(st.lists(values(0), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_a_sum_is_the_sketch_of_all_values_in_any_order_and_grouping(parts: list[Floats], random: object) -> None:
    whole = QuantileSketch.of(np.concatenate(parts))
    shuffled = list(parts)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    sketches = [QuantileSketch.of(part) for part in shuffled]
    left = functools.reduce(lambda one, other: one + other, sketches)
    right = functools.reduce(lambda one, other: other + one, reversed(sketches))
    assert left == right == whole
    assert whole.count == sum(len(part) for part in parts)


def test_zeros_are_counted_apart() -> None:
    sketch = QuantileSketch.of(np.array([[0, 0, 0], [5, 0, 7]], np.float32))
    assert (sketch.zeros, sketch.count) == (4, 6)
    assert sketch.quantile(0.5) == sketch.quantile(0.6) == 0.0  # ranks 2 and 3
    assert sketch.quantile(0.8) == pytest.approx(5, rel=RELATIVE_ERROR)
    assert sketch.quantile(1.0) == pytest.approx(7, rel=RELATIVE_ERROR)
    assert QuantileSketch.of(np.zeros(3, np.float32)).quantile(1.0) == 0.0


def test_no_values_have_no_quantile() -> None:
    empty = QuantileSketch.of(np.empty(0, np.float32))
    assert empty == QuantileSketch({})
    with pytest.raises(ValueError, match="no values has no quantiles"):
        empty.quantile(0.5)
