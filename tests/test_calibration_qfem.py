"""The bisection of QFeM against brute force."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spike_export.calibration.modules import representatives
from spike_export.calibration.qfem import ModuleChoice, choose_modules, keep_highest, linear_count
from tests.tiny_families import tiny_family

NAMES = representatives(replace(tiny_family("llama").checkpoint.config, num_hidden_layers=12))
TOLERANCE = 0.01


def ratios(count: int) -> dict[str, float]:
    return {name: 1000.0 - rank for rank, name in enumerate(NAMES[:count])}


class Curve:
    """Perplexity by number of kept modules; counts how often it is asked."""

    def __init__(self, values: list[float]) -> None:
        self.values = values
        self.asked: list[int] = []

    def __call__(self, kept: tuple[str, ...]) -> float:
        assert kept == NAMES[: len(kept)]  # always the highest ratios
        self.asked.append(len(kept))
        return self.values[len(kept)]


def choose(curve: Callable[[tuple[str, ...]], float], modules: int, reference: float, most: int) -> ModuleChoice:
    return choose_modules(ratios(modules), curve, reference, TOLERANCE, most)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[float], float, int]:
    """Draw a monotonically falling curve over 0..n kept modules, a reference and a budget of linears."""
    steps = draw(st.lists(st.floats(0, 3), min_size=1, max_size=len(NAMES)))
    reference = draw(st.floats(1, 50))
    floor = reference + draw(st.sampled_from([0.0, 0.001, 5.0]))
    values = [floor + sum(steps[rank:]) for rank in range(len(steps) + 1)]
    return values, reference, draw(st.integers(0, 2 * len(steps)))


@settings(deadline=None)
@given(cases())
def test_the_smallest_good_set_is_found(case: tuple[list[float], float, int]) -> None:
    values, reference, budget = case
    curve = Curve(values)
    modules = len(values) - 1
    chosen = choose(curve, modules, reference, budget)
    allowed = [count for count in range(modules + 1) if linear_count(NAMES[:count]) <= budget]
    goal = (1 + TOLERANCE) * max(reference, values[allowed[-1]])
    assert len(chosen.kept) == next(count for count in allowed if values[count] <= goal)
    assert chosen.kept == NAMES[: len(chosen.kept)]
    assert chosen.linears <= budget


@settings(deadline=None)
@given(cases())
def test_few_sets_are_evaluated_and_none_twice(case: tuple[list[float], float, int]) -> None:
    values, reference, budget = case
    curve = Curve(values)
    chosen = choose(curve, len(values) - 1, reference, budget)
    most = len(keep_highest(ratios(len(values) - 1), budget).kept)
    # The plateau, the bisection of 0..most, and nothing kept.
    assert len(curve.asked) <= 2 + math.ceil(math.log2(most + 1))
    assert len(set(curve.asked)) == len(curve.asked)
    assert sorted(set(curve.asked)) == sorted(curve.asked)
    shown = {point.fp16_modules: point.perplexity for point in chosen.curve}
    assert shown == {linear_count(NAMES[:count]): values[count] for count in curve.asked}
    assert 0 in shown
    assert chosen.linears in shown


@settings(deadline=None)
@given(st.lists(st.floats(1, 100), min_size=2, max_size=len(NAMES) + 1), st.floats(1, 100))
def test_a_ragged_curve_still_meets_the_goal(values: list[float], reference: float) -> None:
    curve = Curve(values)
    most = linear_count(NAMES[: len(values) - 1])
    chosen = choose(curve, len(values) - 1, reference, most)
    assert values[len(chosen.kept)] <= (1 + TOLERANCE) * max(reference, values[-1])


def test_the_curve_is_sorted_and_says_thresholds() -> None:
    # Kept: 0, q (3 linears), +o (4), +up (6), +down (7).
    chosen = choose(Curve([50.0, 40.0, 10.0, 10.0, 10.0]), 4, 10.0, 7)
    assert chosen.kept == NAMES[:2]
    assert chosen.linears == 4
    assert chosen.alpha == 998.0  # the highest ratio that is quantized
    assert [(point.fp16_modules, point.alpha) for point in chosen.curve] == [
        (0, 1000.0),
        (3, 999.0),
        (4, 998.0),
        (7, 0.0),
    ]


def test_the_plateau_is_the_goal_where_the_reference_is_out_of_reach() -> None:
    chosen = choose(Curve([50.0, 20.0, 20.0, 20.0, 20.0]), 4, 10.0, 7)
    assert len(chosen.kept) == 1


@pytest.mark.parametrize("values", [[10.0, 10.0], [5.0, 4.0]])
def test_nothing_is_kept_where_nothing_is_gained(values: list[float]) -> None:
    assert choose(Curve(values), 1, 10.0, 3).kept == ()


def test_a_budget_of_nothing_keeps_nothing() -> None:
    curve = Curve([50.0, 10.0])
    assert choose(curve, 1, 10.0, 0).kept == ()
    assert curve.asked == [0]


def test_an_overflowed_plateau_keeps_what_is_allowed() -> None:
    ratios = {f"model.layers.{index}.mlp.down_proj": 9.0 - index for index in range(5)}
    choice = choose_modules(ratios, lambda kept: float("inf"), 10.0, 0.005, max_linears=3)
    assert len(choice.kept) == 3
