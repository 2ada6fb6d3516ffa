"""Limits on accuracy are held against the far end of the 95 % interval."""

from typing import Any

import pytest

from spike_export.artifacts.errors import RecipeError
from spike_export.artifacts.results.accuracy_limits import AccuracyLimits
from spike_export.artifacts.results.check_document import Check
from tests.support.check_costs import cost_document

COST = cost_document(increase=0.25, divergence=0.625, agreement=0.75, margin=0.125)


def check(**variant: Any) -> Check:
    shipped = {"name": "x", "perplexity": 2.0, "shipped": True, **variant}
    return Check.model_validate({"reference": {"perplexity": 1.0}, "variants": [shipped]})


@pytest.mark.parametrize(
    ("limits", "value", "passed"),
    [
        (AccuracyLimits(max_ppl_increase=0.375), 0.375, True),
        (AccuracyLimits(max_ppl_increase=0.37), 0.375, False),
        (AccuracyLimits(max_kl=0.75), 0.75, True),
        (AccuracyLimits(max_kl=0.74), 0.75, False),
        (AccuracyLimits(min_agreement=0.625), 0.625, True),
        (AccuracyLimits(min_agreement=0.63), 0.625, False),
    ],
    ids=str,
)
def test_a_limit_is_kept_where_the_whole_interval_keeps_it(limits: AccuracyLimits, value: float, passed: bool) -> None:
    gated = check(cost=COST).gated(limits)
    assert [(gate.value, gate.passed) for gate in gated.gates] == [(value, passed)]
    assert gated.passed is passed


def test_every_limit_is_a_gate_of_its_own() -> None:
    gated = check(cost=COST).gated(AccuracyLimits(0.4, 0.1, 0.1))
    assert [(gate.name, gate.passed) for gate in gated.gates] == [
        ("max-ppl-increase", True),
        ("max-kl", False),
        ("min-agreement", True),
    ]
    assert not gated.passed
    assert check(cost=COST).gated(AccuracyLimits()).passed


@pytest.mark.parametrize("limits", [AccuracyLimits(1e9), AccuracyLimits(max_kl=1e9), AccuracyLimits(min_agreement=0.1)])
def test_what_was_not_measured_keeps_no_limit(limits: AccuracyLimits) -> None:
    assert not check(increase=0.0).gated(limits).passed  # a document of the first format


@pytest.mark.parametrize(
    ("limits", "option"),
    [
        ({"max_ppl_increase": -0.1}, "--max-ppl-increase is -0.1; expected a fraction"),
        ({"max_ppl_increase": float("nan")}, "--max-ppl-increase is nan"),
        ({"max_kl": -1.0}, "--max-kl is -1.0; expected a divergence"),
        ({"min_agreement": 95.0}, "--min-agreement is 95.0; expected a share such as 0.95"),
        ({"min_agreement": float("nan")}, "--min-agreement is nan"),
    ],
    ids=str,
)
def test_an_impossible_limit_is_refused(limits: dict[str, float], option: str) -> None:
    with pytest.raises(RecipeError, match=option):
        AccuracyLimits(**limits)
