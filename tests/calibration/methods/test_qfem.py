"""The bisection of QFeM against brute force."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spike_export.artifacts.recipe import CurvePoint
from spike_export.calibration.methods.qfem import (
    ModuleChoice,
    Scores,
    choose_modules,
    linear_count,
    mac_shares,
    with_pareto,
)
from spike_export.checkpoint.modules import linears, representatives, siblings
from tests.support.tiny.models import tiny_llama

CONFIG = tiny_llama(layers=12).checkpoint.config
NAMES = representatives(CONFIG)
TOLERANCE = 0.01


def scores(count: int) -> Scores:
    values = {name: 1000.0 - rank for rank, name in enumerate(NAMES[:count])}
    return Scores.sorted("ratio", dict(reversed(values.items())), CONFIG)


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
    order = scores(modules)
    return choose_modules(order, curve, reference, TOLERANCE, order.keep_highest(most))


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
    most = len(scores(len(values) - 1).keep_highest(budget).kept)
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
    order = Scores.sorted("ratio", ratios, CONFIG)
    choice = choose_modules(order, lambda kept: float("inf"), 10.0, 0.005, order.keep_highest(3))
    assert len(choice.kept) == 3


def test_a_set_of_the_other_criterion_says_so() -> None:
    order = Scores.sorted("noise", {"model.layers.0.mlp.down_proj": 0.5, "model.layers.1.mlp.down_proj": 0.1}, CONFIG)
    choice = choose_modules(order, lambda kept: 20.0 - 10 * len(kept), 10.0, 0.005, order.keep_highest(1))
    assert (choice.criterion, choice.kept, choice.alpha) == ("noise", ("model.layers.0.mlp.down_proj",), 0.1)
    assert {point.criterion for point in choice.curve} == {"noise"}


def test_scores_are_sorted_and_ties_keep_their_order() -> None:
    order = Scores.sorted("ratio", {NAMES[0]: 1.0, NAMES[1]: 2.0, NAMES[2]: 2.0, NAMES[3]: 3.0}, CONFIG)
    assert list(order.values) == [NAMES[3], NAMES[1], NAMES[2], NAMES[0]]


def test_a_threshold_keeps_what_exceeds_it() -> None:
    order = scores(4)
    assert order.keep_above(998.0).kept == NAMES[:2]  # 998.0 itself does not exceed it
    assert order.keep_above(998.0).alpha == 998.0
    assert order.keep_above(1000.0).kept == ()


def test_the_number_of_linears_counts_siblings_and_stops_where_they_no_longer_fit() -> None:
    # q (3 linears), o (1), up (2), down (1).
    kept = [scores(4).keep_highest(most).linears for most in range(9)]
    assert kept == [0, 0, 0, 3, 4, 4, 6, 7, 7]


def test_shares_are_multiply_accumulates() -> None:
    # tiny_llama: hidden 48, heads 4/2 of 16, intermediate 80.
    macs = [48 * (64 + 32 + 32), 64 * 48, 48 * 80 * 2, 80 * 48]
    total = 12 * sum(macs)
    shares = mac_shares(CONFIG, NAMES)
    assert [shares[name] for name in NAMES[:4]] == pytest.approx([size / total for size in macs])
    assert math.fsum(shares.values()) == pytest.approx(1)
    order = Scores.sorted("ratio", {name: 1000.0 - rank for rank, name in enumerate(NAMES)}, CONFIG)
    for count in range(5):
        exact = sum(macs[:count]) / total
        assert order.share(NAMES[:count]) == pytest.approx(exact)
        assert order.keep_share(exact + 1e-9).kept == NAMES[:count]
        if count:
            assert order.keep_share(exact - 1e-9).kept == NAMES[: count - 1]
    assert order.keep_share(0).kept == ()
    assert order.keep_share(1).linears == len(linears(CONFIG)) == sum(len(siblings(name)) for name in NAMES)


def test_the_pareto_points_are_those_that_no_other_beats() -> None:
    def point(share: float, perplexity: float) -> CurvePoint:
        return CurvePoint(fp16_modules=1, fp16_share=share, alpha=1.0, perplexity=perplexity)

    points = (point(0, 20), point(0.1, 12), point(0.1, 13), point(0.2, 12), point(0.3, 11), point(0.3, 11))
    assert [each.pareto for each in with_pareto(points)] == [True, True, False, False, True, True]
