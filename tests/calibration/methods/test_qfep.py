"""The helpers of the prefix search against naive implementations."""

from collections import Counter
from random import Random
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from spike_export.calibration.methods.qfep import (
    ProposedPrefix,
    distinct,
    frequent_tokens,
    lowers_worst_ratio,
    search_modules,
    spiking_tokens,
    worst_ratio,
)
from spike_export.calibration.statistics.spikes import ModuleSpikes, SpikeStatistics

BOS = 0
windows = st.tuples(st.integers(1, 5), st.integers(2, 8)).flatmap(
    lambda shape: arrays(np.int64, shape, elements=st.integers(0, 6))
)


def statistics(tokens: NDArray[np.int64], amax: NDArray[np.float32]) -> SpikeStatistics:
    return SpikeStatistics({"m": spikes(amax)}, tokens)


def spikes(amax: NDArray[Any]) -> ModuleSpikes:
    """Token scales, with one channel that has each token's."""
    scales = amax.astype(np.float32)
    return ModuleSpikes(scales, scales.max(axis=1, keepdims=True), np.ones(len(scales), np.float32))


@settings(deadline=None)
@given(windows, st.randoms(use_true_random=False), st.integers(1, 4))
def test_spiking_tokens_by_the_naive_way(tokens: NDArray[np.int64], random: Random, count: int) -> None:
    # Distinct scales, so that no tie decides.
    order = list(range(1, tokens.size + 1))
    random.shuffle(order)
    amax = np.array(order, np.float32).reshape(tokens.shape)
    largest: dict[int, float] = {}
    for row, ids in zip(amax.tolist(), tokens.tolist(), strict=True):
        for scale, token in sorted(zip(row, ids, strict=True), reverse=True)[:3]:
            if token != BOS:
                largest[token] = max(scale, largest.get(token, 0.0))
    expected = [token for _, token in sorted(((scale, token) for token, scale in largest.items()), reverse=True)]
    assert list(spiking_tokens(statistics(tokens, amax), "m", BOS, count)) == expected[:count]


def test_spiking_tokens_by_hand() -> None:
    tokens = np.array([[BOS, 4, 5, 6, 7], [BOS, 5, 5, 8, 9]])
    amax = np.array([[99, 9, 8, 7, 6], [1, 2, 30, 4, 3]])
    # First sample: BOS, 4, 5 (BOS takes a place and is left out); second: 5, 8, 9.
    assert spiking_tokens(statistics(tokens, amax), "m", BOS) == (5, 4, 8)
    assert spiking_tokens(statistics(tokens, amax), "m", BOS, 9) == (5, 4, 8, 9)
    assert spiking_tokens(statistics(tokens, amax), "m", 5, 1) == (BOS,)


@settings(deadline=None)
@given(windows, st.integers(1, 9))
def test_frequent_tokens_by_the_naive_way(tokens: NDArray[np.int64], count: int) -> None:
    frequency = Counter(token for row in tokens.tolist() for token in row[1:])
    expected = sorted(frequency, key=lambda token: (-frequency[token], token))
    assert frequent_tokens(tokens, count).tolist() == expected[:count]


def test_the_first_column_is_not_counted() -> None:
    tokens = np.array([[1, 2, 3], [1, 3, 4]])
    assert frequent_tokens(tokens).tolist() == [3, 2, 4]
    assert len(frequent_tokens(np.arange(1001)[None])) == 200


def test_rate_is_first_over_second() -> None:
    assert ProposedPrefix((0, 1, 2), 8.0, 2.0).rate == 4.0
    assert ProposedPrefix((0, 1, 2), 8.0, 0.0).rate == float("inf")


def test_only_a_lower_ratio_is_accepted() -> None:
    assert lowers_worst_ratio(9.9, 10.0)
    assert not lowers_worst_ratio(10.0, 10.0)
    assert not lowers_worst_ratio(float("nan"), 10.0)


def test_the_worst_module_is_the_highest_ratio() -> None:
    mild, wild = (spikes(np.array([[1, 1, top]])) for top in (2, 7))
    measured = SpikeStatistics({"mild": mild, "wild": wild}, np.zeros((1, 3), np.int64))
    assert worst_ratio(measured) == ("wild", 7.0)


def test_prefixes_compete_once_each_in_order() -> None:
    assert distinct([(), (0,), (0, 1, 2), (0,), ()]) == [(), (0,), (0, 1, 2)]


def test_prefixes_are_searched_for_the_worst_modules_of_different_layers() -> None:
    def ratios(values: dict[str, float]) -> SpikeStatistics:
        modules = {name: spikes(np.array([[1, 1, ratio]])) for name, ratio in values.items()}
        return SpikeStatistics(modules, np.zeros((1, 3), np.int64))

    down, up = "model.layers.{}.mlp.down_proj", "model.layers.{}.mlp.up_proj"
    router = "model.layers.0.block_sparse_moe.gate"
    wild = {down.format(1): 900.0, up.format(1): 800.0, down.format(4): 70.0, down.format(2): 60.0, router: 999.0}
    assert search_modules(ratios(wild)) == (down.format(1), down.format(4))
    # Below the ratio from which on a spike is one, the worst is searched alone.
    assert search_modules(ratios({up.format(0): 4.0, down.format(3): 9.0})) == (down.format(3),)
