"""The margin of a static range: how far one part of the calibration exceeds what another part makes."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from spike_export.artifacts.recipe import activation_scale
from spike_export.calibration.corpus.corpus import Corpus
from spike_export.calibration.corpus.token_windows import TokenWindows
from spike_export.calibration.methods.context import Calibration
from spike_export.calibration.methods.module_choice import NOTHING_KEPT
from spike_export.calibration.methods.options import CalibrationOptions
from spike_export.calibration.methods.range_margin import range_margin
from spike_export.calibration.methods.transform_choice import choose_transform
from spike_export.calibration.recipe_writer import build_recipe
from spike_export.calibration.statistics.spikes import ModuleSpikes, SpikeStatistics
from tests.support.tiny.families import tiny_family, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

CHANNELS = 5
UP, GATE = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.gate_proj"

amaxima = arrays(
    np.float32, st.tuples(st.integers(1, 4), st.just(CHANNELS)), elements=st.floats(2.0**-9, 512, width=32)
)
positive = arrays(np.float32, CHANNELS, elements=st.floats(2.0**-4, 16, width=32))


def part(rows: Any) -> ModuleSpikes:
    channels = np.array(rows, np.float32)
    return ModuleSpikes(channels.max(1, keepdims=True), channels, np.zeros(len(channels), np.float32))


@settings(deadline=None)
@given(amaxima, amaxima, positive, positive)
def test_the_margin_is_the_largest_mean_exceedance(
    first: NDArray[np.float32], second: NDArray[np.float32], one: NDArray[np.float32], other: NDArray[np.float32]
) -> None:
    def largest(rows: NDArray[np.float32], scales: NDArray[np.float32]) -> float:
        return sum(
            max(float(value) / float(scale) for value, scale in zip(row, scales, strict=True)) for row in rows
        ) / len(rows)

    expected = max(1.0, largest(second, one) / largest(first, one), largest(first, other) / largest(second, other))
    found = range_margin([part(first), part(second)], [one, other])
    assert found == pytest.approx(expected, rel=2.0**-22)  # two float32 divisions
    assert found == range_margin([part(second), part(first)], [other, one])


def test_parts_that_are_alike_need_no_margin() -> None:
    rows = [[1.0, 2.0, 4.0], [2.0, 1.0, 4.0]]
    ones = np.ones(3, np.float32)
    assert range_margin([part(rows), part(rows)], [ones, ones]) == 1


def test_a_quiet_channel_that_another_part_drives_counts_behind_the_smoothing_of_the_first() -> None:
    quiet, loud = part([[8.0, 1.0]]), part([[8.0, 4.0]])
    levelled, as_loud = np.array([8.0, 1.0], np.float32), np.array([8.0, 4.0], np.float32)
    # Behind the first part's smoothing both channels reach 1; the second part's second channel reaches 4.
    assert range_margin([quiet, loud], [levelled, as_loud]) == 4
    assert range_margin([quiet, loud], [np.ones(2, np.float32)] * 2) == 1


def test_a_part_that_no_token_reached_says_nothing() -> None:
    nothing = ModuleSpikes(np.full((1, 1), np.nan, np.float32), np.zeros((1, 2), np.float32), np.zeros(1, np.float32))
    ones = np.ones(2, np.float32)
    assert range_margin([nothing, part([[3.0, 1.0]])], [ones, ones]) == 1
    assert range_margin([nothing, part([[2.0, 1.0]]), part([[3.0, 1.0]])], [ones] * 3) == 1.5


@pytest.fixture(scope="module")
def two_kinds() -> tuple[Calibration, SpikeStatistics]:
    """A tiny model, and statistics whose second kind of text drives one channel of an input that the first leaves."""
    content = tokens(rows=12, length=24)
    windows = TokenWindows(content[:8], content[8:], np.repeat([0, 1], 4))
    options = CalibrationOptions(samples=8, length=25, hadamard="never", dtype="float32", activations="static")
    calibration = Calibration(tiny_family("llama").checkpoint, windows, options)
    statistics = calibration.measure(())
    seen = statistics.modules[UP]
    channels = seen.sample_channel_amax.copy()
    channels[4:, 3] *= 8
    return calibration, replace(
        statistics, modules={**statistics.modules, UP: replace(seen, sample_channel_amax=channels)}
    )


def test_the_recipes_range_has_the_margin(two_kinds: tuple[Calibration, SpikeStatistics]) -> None:
    calibration, statistics = two_kinds
    choice = choose_transform(calibration, statistics)
    clips = choice.transform.clips
    assert clips[UP] > 1.5 > clips["model.layers.0.mlp.up_proj"] > 1
    assert {clips[name] for name in clips if name.endswith("down_proj")} == {1.0}
    after = calibration.measure((), choice.transform)
    recipe = build_recipe(calibration, Corpus("test", ("text",)), after, NOTHING_KEPT, choice.transform)
    for name in (UP, GATE):
        plan = recipe.modules[name]
        assert plan.clip == clips[UP]
        assert plan.activation_scale == activation_scale(clips[UP] * after.modules[UP].range("sample-mean"))


@pytest.mark.parametrize("rule", ["max", "percentile"])
def test_rules_that_the_user_chose_have_no_margin(two_kinds: tuple[Calibration, SpikeStatistics], rule: Any) -> None:
    calibration, statistics = two_kinds
    chosen = calibration.with_options(replace(calibration.options, activation_range=rule))
    assert set(choose_transform(chosen, statistics).transform.clips.values()) == {1.0}


def test_one_kind_of_text_is_held_against_itself_in_halves() -> None:
    checkpoint, content = tiny_family("llama").checkpoint, tokens(rows=6, length=24)

    def parts(kinds: list[int]) -> list[list[int]]:
        count = len(kinds)
        windows = TokenWindows(content[:count], content[count:], np.array(kinds))
        calibration = Calibration(checkpoint, windows, CalibrationOptions(samples=count, length=25, dtype="float32"))
        return [each.sample_ids.tolist() for each in calibration.parts(calibration.measure(()))]

    assert parts([0, 0, 0, 0, 0]) == [[0, 2, 4], [1, 3]]
    assert parts([0, 0, 1, 1, 2]) == [[0, 1], [2, 3], [4]]
    assert parts([0]) == []
