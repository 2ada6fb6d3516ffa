"""Drafts are made where they pay, and cost next to nothing where they do not."""

import numpy as np
import pytest

from spike_export.engines.generation.draft_length import DraftLength

TOKENS = 1000


def speed(
    chance: float, cost: float, found: float = 1.0, noise: float = 0.0, seed: int = 0
) -> tuple[float, DraftLength]:
    """Return how many times faster a text is drawn than without drafts.

    Args:
        chance: Of a drafted token to be drawn, each by itself.
        cost: Of a drafted token, in calls without a draft.
        found: Share of the places where there is anything to draft.
        noise: Relative deviation of a call's time.
        seed: Of the draws.
    """
    random, lengths = np.random.default_rng(seed), DraftLength()
    drawn, seconds = 0, 0.0
    while drawn < TOKENS:
        draft = lengths.choose() if random.random() < found else 0
        hits = 0
        while hits < draft and random.random() < chance:
            hits += 1
        taken = 1 + cost * draft
        lengths.record(draft, hits, taken * float(np.exp(noise * random.standard_normal())))
        drawn, seconds = drawn + hits + 1, seconds + taken
    return drawn / seconds, lengths


@pytest.mark.parametrize("cost", [0.01, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("chance", [0.0, 0.1, 0.3, 0.6])
@pytest.mark.parametrize("found", [0.1, 1.0])
def test_drafts_never_cost_five_percent(chance: float, cost: float, found: float) -> None:
    speeds = [speed(chance, cost, found, noise=0.1, seed=seed)[0] for seed in range(5)]
    assert np.mean(speeds) >= 0.95


@pytest.mark.parametrize(("chance", "cost", "least"), [(0.95, 0.1, 2.8), (0.9, 0.15, 2.0), (0.8, 0.05, 1.8)])
def test_drafts_that_are_right_pay(chance: float, cost: float, least: float) -> None:
    reached, lengths = speed(chance, cost)
    assert reached >= least
    assert lengths.accepted / lengths.drafted > 0.3


def test_the_first_call_has_no_draft() -> None:
    assert DraftLength().choose() == 0


def test_a_trial_that_pays_ends_the_rests() -> None:
    lengths = DraftLength()
    lengths.record(0, 0, 1.0)
    for _ in range(40):
        drafted = lengths.choose()
        lengths.record(drafted, 0, 1 + 0.2 * drafted)
    assert lengths.choose() == 0
    for _ in range(2000):
        drafted = lengths.choose()
        lengths.record(drafted, drafted, 1 + 0.2 * drafted)
    assert lengths.choose() == 8
