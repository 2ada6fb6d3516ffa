"""The rules by which choices are made, on numbers by hand: what has a part in an order, in a cost, and in a model."""

import math
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from spike_export.artifacts.errors import CalibrationError
from spike_export.artifacts.recipe import HadamardPlan, RotationPlan, SmoothingPlan
from spike_export.calibration.corpus.token_windows import TokenWindows
from spike_export.calibration.decoder.perplexity import Likelihood, Score, WindowScore
from spike_export.calibration.methods import activation_choice, context, transform_choice
from spike_export.calibration.methods.activation_choice import WORTH, choose_measured_activations
from spike_export.calibration.methods.context import NO_TRANSFORM, Calibration, Transform, attention_plans, module_plans
from spike_export.calibration.methods.module_choice import choose_kept
from spike_export.calibration.methods.options import CalibrationOptions
from spike_export.calibration.methods.qfem import Scores, mac_shares
from spike_export.calibration.methods.transform_choice import ROTATION_SEEDS, UNTYING
from spike_export.calibration.statistics.spikes import ModuleSpikes, SpikeStatistics
from tests.support.tiny.families import tiny_family, tokens

CHECKPOINT = tiny_family("llama").checkpoint
CONFIG = CHECKPOINT.config
O_PROJ, UP, DOWN = (f"model.layers.0.{name}" for name in ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"))
SMOOTHED = SmoothingPlan(form="smoothquant", parameter=0.5, exponents="AA==")
ROTATED = RotationPlan(kind="orthogonal", seed=0)


def statistics_of(largest: Mapping[str, float], operands: Mapping[str, Any] = {}) -> SpikeStatistics:
    """Two samples of three tokens; the largest of the first one is given, all others are 1."""
    modules = {
        name: ModuleSpikes(
            np.array([[1, amax, 1], [1, 1, 1]], np.float32),
            np.array([[amax, 1], [1, 1]], np.float32),
            np.array([2 * amax, 1], np.float32),
        )
        for name, amax in largest.items()
    }
    return SpikeStatistics(modules, np.zeros((2, 3), np.int64), operand_amax=operands)


def stand_in(**options: Any) -> Any:
    """What the rules ask a calibration for."""
    return SimpleNamespace(options=CalibrationOptions(**options), checkpoint=CHECKPOINT)


@pytest.fixture
def calibration() -> Calibration:
    content = tokens(rows=8, length=12)
    return Calibration(CHECKPOINT, TokenWindows(content[:6], content[6:]), CalibrationOptions(samples=6, length=13))


@pytest.mark.parametrize(
    ("transform", "changed"),
    [
        (NO_TRANSFORM, False),
        (Transform(clips={UP: 0.9}, noise={UP: 1.0}, token_noise={UP: 0.5}), False),
        (Transform(rotation=ROTATED), True),
        (Transform(hadamard=HadamardPlan(block=16)), True),
        (Transform(value_rotation={UP: 16}), True),
        (Transform(input_hadamard={UP: 16}), True),
        (Transform(smoothing={UP: SMOOTHED}), True),
    ],
)
def test_rotation_and_smoothing_change_weights(transform: Transform, changed: bool) -> None:
    assert transform.changes_weights is changed


def test_the_noise_is_that_of_each_inputs_scales() -> None:
    transform = Transform(noise={UP: 4.0, DOWN: 3.0}, token_noise={UP: 2.0, DOWN: 1.0})
    assert transform.noise_with(()) == {UP: 4.0, DOWN: 3.0}
    assert transform.noise_with((DOWN,)) == {UP: 4.0, DOWN: 1.0}


def test_other_options_share_the_model_where_its_weights_are_the_same(calibration: Calibration) -> None:
    options = calibration.options
    unread = calibration.with_options(replace(options, tolerance=0.5))
    assert (unread.options.tolerance, "model" in unread.__dict__) == (0.5, False)
    model = calibration.model
    assert calibration.with_options(replace(options, tolerance=0.5)).model is model
    assert calibration.with_options(replace(options, weights="int8-per-tensor")).model is not model


def test_inputs_are_ordered_by_the_noise_that_they_save_for_their_size() -> None:
    measured = statistics_of({O_PROJ: 9, UP: 3, DOWN: 5})
    assert list(activation_choice._order(stand_in(), measured, NO_TRANSFORM).values) == [O_PROJ, DOWN, UP]
    transform = Transform(noise={O_PROJ: 2.0, UP: 9.0, DOWN: 6.0}, token_noise={O_PROJ: 2.0, UP: 1.0, DOWN: 1.0})
    order = activation_choice._order(stand_in(), measured, transform)
    macs = mac_shares(CONFIG, (O_PROJ, UP, DOWN))
    assert (order.criterion, order.macs) == ("noise", macs)
    # up_proj's readers are twice as large as down_proj; o_proj's input saves nothing.
    assert list(order.values.items()) == [(DOWN, 5 / macs[DOWN]), (UP, 8 / macs[UP])]


def test_inputs_of_down_projections_come_first_whatever_they_save() -> None:
    measured = statistics_of({O_PROJ: 9, UP: 3, DOWN: 5})
    transform = Transform(noise={O_PROJ: 2.0, UP: 9.0, DOWN: 6.0}, token_noise={O_PROJ: 1.0, UP: 1.0, DOWN: 6.5})
    order = activation_choice._order(stand_in(), measured, transform)
    macs = mac_shares(CONFIG, (O_PROJ, UP, DOWN))
    assert list(order.values) == [DOWN, *sorted((O_PROJ, UP), key=lambda name: -{O_PROJ: 1, UP: 8}[name] / macs[name])]


def test_smaller_inputs_fill_what_a_larger_one_leaves_of_the_budget() -> None:
    macs = {"half": 0.5, "large": 0.4, "small": 0.2, "smaller": 0.1}
    order = Scores("noise", dict.fromkeys(macs, 1.0), macs)
    assert activation_choice._fitting(order, 0.8) == ("half", "small", "smaller")
    assert activation_choice._fitting(order, 0.05) == ()


@pytest.mark.parametrize(
    ("mixed", "verdicts"),
    [
        (1 - WORTH, ["chosen", "saves too little"]),  # no more than is worth it
        (0.5, ["further from the unquantized model", "chosen"]),
    ],
)
def test_scales_per_token_have_to_save_enough(mixed: float, verdicts: list[str]) -> None:
    told: list[tuple[str, int, int]] = []
    calibration = stand_in(activations="auto", max_per_token_share=1.0)
    calibration.held_out = lambda measured: measured
    calibration.predicted = lambda *_, per_token, measured: Score(9.0, mixed if per_token and measured else 1.0)
    measured = statistics_of({UP: 3, DOWN: 5})
    chosen = choose_measured_activations(calibration, measured, lambda *step: told.append(step))
    assert chosen.per_token == ((DOWN, UP) if verdicts[1] == "chosen" else ())
    assert [(each.per_token_linears, each.per_token_share) for each in chosen.candidates] == [(0, 0.0), (3, 1.0)]
    assert [(each.divergence, each.verdict) for each in chosen.candidates] == [(1.0, verdicts[0]), (mixed, verdicts[1])]
    assert told == [("sets of inputs", 1, 2), ("sets of inputs", 2, 2)]


@pytest.mark.parametrize(
    ("tied", "rotation", "asked", "more"),
    [
        (True, ROTATED, "auto", UNTYING),
        (True, None, "auto", 0.0),
        (False, ROTATED, "auto", 0.0),
        (True, ROTATED, "always", 0.0),
    ],
)
def test_a_rotation_that_unties_the_head_has_to_pay_for_it(
    tied: bool, rotation: RotationPlan | None, asked: Any, more: float
) -> None:
    checkpoint = SimpleNamespace(config=SimpleNamespace(tie_word_embeddings=tied))
    calibration: Any = SimpleNamespace(options=CalibrationOptions(rotation=asked), checkpoint=checkpoint)
    found = transform_choice._Found(rotation, {})
    assert transform_choice._cost(calibration, found, Score(9.0, 0.25)) == 0.25 + more


@pytest.mark.parametrize(("divergence", "pays"), [(0.91, False), (0.89, True)])
def test_each_hadamard_transform_has_to_save_a_tenth(divergence: float, pays: bool) -> None:
    plain, changed = transform_choice._Found(None, {}), transform_choice._Found(None, {}, HadamardPlan(block=16))
    everywhere, inputs = replace(changed, inputs=True), replace(plain, inputs=True)
    calibration = stand_in()
    for less, more in ((plain, changed), (changed, everywhere), (plain, inputs)):
        with_it = transform_choice._cost(calibration, more, Score(9.0, divergence))
        assert (with_it < transform_choice._cost(calibration, less, Score(9.0, 1.0))) == pays
    twice = transform_choice._cost(calibration, everywhere, Score(9.0, 0.9 * divergence))
    assert (twice < transform_choice._cost(calibration, plain, Score(9.0, 1.0))) == pays


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ("never", ["smoothing"]),
        ("auto", ["smoothing", "smoothing + Hadamard"]),
        ("down_proj", ["smoothing", "smoothing + Hadamard"]),
        ("always", ["smoothing + Hadamard"]),
    ],
)
def test_which_hadamard_transforms_compete(asked: Any, names: list[str]) -> None:
    searched = transform_choice._Found(None, {})
    found = list(transform_choice._with_and_without_hadamard(stand_in(hadamard=asked), "smoothing", searched))
    assert [name for name, _ in found] == names
    assert [each.hadamard for _, each in found] == [HadamardPlan(block=16) if "H" in name else None for name in names]


@pytest.mark.parametrize(
    ("asked", "smoothing", "names"),
    [
        ("never", True, ["smoothing"]),
        ("never", False, ["none"]),
        ("always", True, [f"hadamard, seed {seed}" for seed in ROTATION_SEEDS]),
        ("auto", True, ["smoothing", *(f"hadamard, seed {seed}" for seed in ROTATION_SEEDS)]),
    ],
)
def test_which_rotations_compete(asked: Any, smoothing: bool, names: list[str]) -> None:
    found = transform_choice._rotations(stand_in(rotation=asked, smoothing=smoothing))
    assert [name for name, _ in found] == names
    assert [plan and plan.seed for _, plan in found] == [None] * (asked != "always") + [*ROTATION_SEEDS] * (
        asked != "never"
    )


def test_a_perplexity_that_is_no_figure_names_whose_it_is(
    calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = WindowScore(Likelihood(math.inf, 1))
    monkeypatch.setattr(context, "window_scores", lambda *_, **__: [endless])
    measured = calibration.measure(())
    with pytest.raises(CalibrationError, match="perplexity of the quantized model is inf on the calibration windows"):
        calibration.predicted(measured, (), NO_TRANSFORM, compare=False)


def test_without_qfem_the_threshold_is_the_largest_ratio() -> None:
    measured = statistics_of({UP: 3, DOWN: 5})
    chosen = choose_kept(stand_in(qfem=False), measured, NO_TRANSFORM)
    assert (chosen.kept, chosen.alpha) == ((), measured.ratios()[DOWN])


def test_a_plan_says_what_calibration_saw() -> None:
    measured = statistics_of({UP: 3, DOWN: 127})
    transform = Transform(clips={DOWN: 0.5}, noise={UP: 4.0, DOWN: 3.0}, token_noise={UP: 2.0, DOWN: 1.0})
    options = CalibrationOptions(dtype="float32", activations="static", activation_range="max")
    plans = module_plans(measured, (UP,), transform, options)
    assert list(plans) == [UP, UP.replace("up", "gate"), DOWN]
    assert (plans[UP].precision, plans[UP].reason, plans[UP].noise) == ("float32", "score > alpha", 4.0)
    assert (plans[UP].ratio, plans[UP].clip, plans[UP].weights) == (2.0, None, None)
    down = plans[DOWN]
    assert (down.precision, down.activations, down.ratio) == ("int8", "static", 64.0)
    assert (down.activation_scale, down.activation_amax) == (0.5, 127.0)
    assert (down.clip, down.noise) == (0.5, 3.0)
    smoothed = module_plans(measured, (), transform, options, {DOWN: np.array([4, 1], np.float32)})
    assert (smoothed[DOWN].activation_scale, smoothed[DOWN].activation_amax) == (0.125, None)
    own = module_plans(measured, (), transform, options, per_token=(DOWN,))
    assert (own[DOWN].activations, own[DOWN].noise, own[UP].activations) == ("per-token", 1.0, "static")


def test_the_steps_of_attentions_operands() -> None:
    operands = {"model.layers.0.self_attn": np.array([[127, 254, 12.7], [63.5, 1, 1]], np.float32)}
    measured = statistics_of({UP: 3}, operands)
    assert attention_plans(measured, CalibrationOptions(attention="unquantized")) == {}
    options = CalibrationOptions(attention="int8-per-tensor-static", activation_range="max")
    (plan,) = attention_plans(measured, options).values()
    assert (plan.query, plan.key, plan.value) == (1.0, 2.0, pytest.approx(0.1, rel=1e-6))
