r"""A spike planted in a random model: found by name and token, kept in 16 bit by QFeM, taken away by QFeP.

The checkpoint lies on disk as a user's would. In one module `\n` spikes in one channel, the first time only.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from spike_export.artifacts.recipe import ActivationRange, Recipe, Search, activation_scale, load_recipe, save_recipe
from spike_export.calibration.corpus.corpus import Corpus
from spike_export.calibration.corpus.token_windows import TokenWindows
from spike_export.calibration.methods.activation_choice import ActivationChoice, choose_measured_activations
from spike_export.calibration.methods.context import NO_TRANSFORM, Calibration, Transform
from spike_export.calibration.methods.kept_weights import KeptWeights, choose_kept_weights
from spike_export.calibration.methods.module_choice import NOTHING_KEPT, choose_kept
from spike_export.calibration.methods.options import CalibrationOptions
from spike_export.calibration.methods.prefix_choice import NEUTRALITY, PrefixChoice, choose_prefix
from spike_export.calibration.methods.qfem import mac_shares
from spike_export.calibration.methods.qfep import propose_prefixes, spiking_tokens, worst_ratio
from spike_export.calibration.methods.transform_choice import choose_transform
from spike_export.calibration.recipe_writer import build_recipe
from spike_export.calibration.statistics.measure import measure_spikes
from spike_export.calibration.statistics.spikes import SpikeStatistics
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.checkpoint.decoder_config import decoder_config
from spike_export.checkpoint.modules import linears, representatives, siblings
from spike_export.checkpoint.opening import open_checkpoint
from tests.support.tiny.checkpoints import (
    BOS,
    PLANTED_CHANNEL,
    PLANTED_MODULE,
    SPIKING_CHARACTER,
    as_text,
    planted_spike_llama,
    sampled_text,
    token_of,
    write_hf,
)

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = 3
CONFIG = decoder_config(planted_spike_llama().config.to_dict(), "planted")
SPIKING = token_of(SPIKING_CHARACTER)

ORDINARY = 10.0
"""No ratio of a random model of this size comes near; the planted one is above a thousand."""


AUTOMATIC = CalibrationOptions(
    samples=32, length=48, qfem=False, smoothing=False, activation_range="max", excluded_weights="auto"
)
"""The paper's method, but for the weights of what is kept."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(str(write_hf(tmp_path_factory.mktemp("planted") / "planted", planted_spike_llama())))


@pytest.fixture(scope="module")
def windows() -> TokenWindows:
    tokens = sampled_text(planted_spike_llama())
    return TokenWindows(tokens[:32], tokens[32:])


@pytest.fixture(scope="module")
def calibration(checkpoint: Checkpoint, windows: TokenWindows) -> Calibration:
    """The paper's method: nothing is smoothed, and a scale covers the largest magnitude."""
    options = CalibrationOptions(
        samples=32, length=48, qfem=False, smoothing=False, activation_range="max", prefix_length=3
    )
    return Calibration(checkpoint, windows, options)


@pytest.fixture(scope="module")
def plain(calibration: Calibration) -> SpikeStatistics:
    return calibration.measure(())


@pytest.fixture(scope="module")
def prefixes(calibration: Calibration, plain: SpikeStatistics) -> PrefixChoice:
    return choose_prefix(calibration, plain)


@pytest.fixture(scope="module")
def behind(calibration: Calibration, prefixes: PrefixChoice) -> SpikeStatistics:
    return calibration.measure(prefixes.token_ids)


def with_options(calibration: Calibration, **changes: Any) -> Calibration:
    return calibration.with_options(replace(calibration.options, **changes))


def test_every_module_is_measured_with_the_tokens_it_saw(plain: SpikeStatistics, windows: TokenWindows) -> None:
    assert tuple(plain.modules) == representatives(CONFIG)
    assert plain.prefix_ids == ()
    assert (plain.token_ids[:, 0] == BOS).all()
    np.testing.assert_array_equal(plain.token_ids[:, 1:], windows.calibration)
    for spikes in plain.modules.values():
        assert spikes.token_amax.shape == (32, 49)
        # Two ways to the same maximum.
        assert spikes.token_amax.max() == spikes.sample_channel_amax.max() == spikes.channel_amax.max() == spikes.amax
        np.testing.assert_array_equal(spikes.sample_channel_amax.max(1), spikes.sample_amax)


def test_the_spike_is_found(plain: SpikeStatistics) -> None:
    module, ratio = worst_ratio(plain)
    others = [value for name, value in plain.ratios().items() if name != PLANTED_MODULE]
    assert module == PLANTED_MODULE
    assert ratio > 1000
    assert max(others) < ORDINARY
    assert spiking_tokens(plain, PLANTED_MODULE, BOS)[0] == SPIKING
    assert plain.modules[PLANTED_MODULE].channel_amax.argmax() == PLANTED_CHANNEL


def test_only_the_first_occurrence_spikes(plain: SpikeStatistics) -> None:
    amax = plain.modules[PLANTED_MODULE].token_amax
    first = np.argmax(plain.token_ids == SPIKING, axis=1)
    rows = np.arange(len(amax))
    np.testing.assert_array_equal(amax.argmax(axis=1), first)
    later = amax.copy()
    later[rows, first] = 0
    assert (plain.token_ids == SPIKING).sum() > 2 * len(amax)  # there are later ones
    assert later.max() < amax[rows, first].min() / 100


def test_only_who_wins_is_judged_by_the_unquantized_model(calibration: Calibration, prefixes: PrefixChoice) -> None:
    judged = {each.token_ids: each.reference_perplexity for each in prefixes.candidates if each.reference_perplexity}
    won = prefixes.token_ids
    assert judged == {prefix: calibration.reference_perplexity(prefix) for prefix in ((), won)}


def test_a_budget_of_one_keeps_the_planted_module(calibration: Calibration, plain: SpikeStatistics) -> None:
    chosen = choose_kept(with_options(calibration, qfem=True, max_fp16_modules=1), plain, NO_TRANSFORM)
    assert chosen.kept == (PLANTED_MODULE,)
    assert max(value for name, value in plain.ratios().items() if name != PLANTED_MODULE) == chosen.alpha
    by_hand = with_options(calibration, qfem=True, alpha=ORDINARY)
    assert choose_kept(by_hand, plain, NO_TRANSFORM).kept == (PLANTED_MODULE,)
    assert choose_kept(calibration, plain, NO_TRANSFORM).kept == ()  # QFeM is off there


@pytest.mark.parametrize("searched", [False, True], ids=["by ratio", "by noise"])
def test_the_planted_module_is_the_first_to_get_a_scale_per_token(
    calibration: Calibration, plain: SpikeStatistics, searched: bool
) -> None:
    ranges: ActivationRange = "mse" if searched else "max"
    share = mac_shares(calibration.checkpoint.config, tuple(plain.modules))[PLANTED_MODULE]
    automatic = with_options(
        calibration, activations="auto", activation_range=ranges, max_per_token_share=share, hadamard="never"
    )
    seen: list[tuple[str, int, int]] = []

    def chosen_by(calibration: Calibration) -> tuple[Transform, ActivationChoice]:
        if not searched:
            return NO_TRANSFORM, choose_measured_activations(calibration, plain, lambda *event: seen.append(event))
        choice = choose_transform(calibration, plain, lambda *event: seen.append(event))
        return choice.transform, choice.kinds

    transform, found = chosen_by(automatic)
    assert bool(transform.noise) == searched
    assert found.per_token == (PLANTED_MODULE,)
    assert seen[-2:] == [("sets of inputs", 1, 2), ("sets of inputs", 2, 2)]
    assert [each.verdict for each in found.candidates] == ["further from the unquantized model", "chosen"]
    static, chosen = found.candidates
    assert (static.per_token_linears, static.per_token_share, chosen.per_token_linears) == (0, 0, 1)
    assert chosen.divergence < 0.1 * static.divergence
    # A larger budget is spent, although the other inputs hardly matter for this text.
    _, wider = chosen_by(with_options(automatic, max_per_token_share=3 * share))
    assert wider.per_token[0] == PLANTED_MODULE
    assert len(wider.per_token) > 1
    recipe = build_recipe(
        automatic, corpus(automatic.windows), plain, NOTHING_KEPT, transform, per_token=found.per_token
    )
    assert [name for name, plan in recipe.modules.items() if plan.per_token] == [PLANTED_MODULE]


def test_constants_stay_where_nothing_is_gained_or_nothing_fits(
    calibration: Calibration, plain: SpikeStatistics
) -> None:
    nothing_fits = with_options(calibration, activations="auto", max_per_token_share=0.0)
    assert choose_measured_activations(nothing_fits, plain) == ActivationChoice()
    for kind in ("static", "per-token"):
        fixed = with_options(calibration, activations=kind)
        assert choose_measured_activations(fixed, plain) == ActivationChoice()


def test_the_automatic_choice_keeps_the_planted_module_alone(calibration: Calibration, plain: SpikeStatistics) -> None:
    automatic = with_options(calibration, qfem=True, max_fp16_share=0.15)
    seen: list[tuple[str, int, int]] = []
    chosen = choose_kept(automatic, plain, NO_TRANSFORM, lambda *event: seen.append(event))
    reference = automatic.reference_perplexity(())
    by_count = {point.fp16_modules: point.perplexity for point in chosen.curve}
    assert chosen.kept == (PLANTED_MODULE,)
    # All other channels of the module round to zero beside the spike: the layer is lost.
    assert by_count[0] > 1.3 * reference
    assert by_count[1] < 1.05 * reference
    assert [point.fp16_share <= 0.15 for point in chosen.curve] == [True] * len(chosen.curve)
    assert max(by_count) > 1
    assert [event[1] for event in seen] == list(range(1, len(by_count) + 1))


def test_kept_weights_are_int8_where_that_costs_little(calibration: Calibration, plain: SpikeStatistics) -> None:
    automatic = with_options(calibration, excluded_weights="auto")
    seen: list[tuple[str, int, int]] = []
    chosen = choose_kept_weights(
        automatic, plain, (PLANTED_MODULE,), NO_TRANSFORM, lambda *event: seen.append(event), per_token=()
    )
    assert chosen.form == "int8"
    assert seen == [("weights of kept modules", 1, 2), ("weights of kept modules", 2, 2)]
    narrow, wide = chosen.candidates
    weights = CONFIG.hidden_size * CONFIG.intermediate_size
    assert (narrow.bytes, wide.bytes, narrow.linears) == (weights, 2 * weights, 1)
    assert (narrow.verdict, wide.verdict) == ("chosen", "saves too little for its bytes")
    # The comparison is of the recipes that follow from either form.
    for candidate in chosen.candidates:
        said = with_options(calibration, excluded_weights=candidate.weights)
        assert candidate.divergence == said.predicted(plain, (PLANTED_MODULE,), NO_TRANSFORM, measured=True).divergence
    assert choose_kept_weights(automatic, plain, (), NO_TRANSFORM) == KeptWeights()
    assert choose_kept_weights(calibration, plain, (PLANTED_MODULE,), NO_TRANSFORM) == KeptWeights("unquantized")


def test_kept_weights_are_16_bit_where_int8_ruins_them(
    calibration: Calibration, plain: SpikeStatistics, tmp_path: Path
) -> None:
    model = planted_spike_llama()
    block = model.get_submodule(PLANTED_MODULE.rpartition(".")[0])
    other = (PLANTED_CHANNEL + 1) % CONFIG.intermediate_size
    with torch.no_grad():  # the same function; but one column sets the step of every row of the weight
        block.get_submodule("up_proj").get_parameter("weight")[other] /= 2**12
        block.get_submodule("down_proj").get_parameter("weight")[:, other] *= 2**12
    stretched = Calibration(open_checkpoint(str(write_hf(tmp_path / "model", model))), calibration.windows, AUTOMATIC)
    chosen = choose_kept_weights(stretched, plain, (PLANTED_MODULE,), NO_TRANSFORM)
    assert chosen.form == "unquantized"
    assert [each.verdict for each in chosen.candidates] == ["further from the unquantized model", "chosen"]


def test_the_found_prefix_holds_the_spiking_token(calibration: Calibration, plain: SpikeStatistics) -> None:
    best, *others = propose_prefixes(calibration.model.decoder, plain, BOS)
    assert (best.token_ids[0], best.token_ids[2]) == (BOS, SPIKING)
    assert best.rate > 100
    bos, context, token = best.token_ids
    sequence = np.array([[bos, context, token, context, token]])
    scales = measure_spikes(calibration.model.decoder, sequence).modules[PLANTED_MODULE].token_amax[0]
    # Alone or in a batch of 200: float32 rounding of two layers.
    assert (best.first, best.second) == pytest.approx((scales[2], scales[4]), rel=1e-4)
    assert max(prefix.rate for prefix in others) < ORDINARY


def test_the_found_prefix_wins_the_competition(prefixes: PrefixChoice) -> None:
    by_prefix = {candidate.token_ids: candidate for candidate in prefixes.candidates}
    chosen = by_prefix[prefixes.token_ids]
    reference = prefixes.candidates[0].reference_perplexity
    assert reference is not None
    assert prefixes.token_ids[0] == BOS
    assert prefixes.token_ids[2] == SPIKING
    assert [candidate.verdict for candidate in prefixes.candidates].count("chosen") == 1
    assert chosen.verdict == "chosen"
    assert prefixes.candidates[0].token_ids == ()
    assert (BOS,) in by_prefix
    assert chosen.text.startswith("<s>")
    assert chosen.text.endswith("\n")
    for candidate in prefixes.candidates:
        if candidate is chosen:
            continue
        assert candidate.worst_module == PLANTED_MODULE
        assert candidate.ratio > 1000
        if candidate.verdict == "turned down: changes the unquantized model":
            assert candidate.perplexity is None
            assert candidate.reference_perplexity is not None
            assert candidate.reference_perplexity > (1 + NEUTRALITY) * reference
        elif candidate.perplexity is None:
            assert candidate.verdict == "turned down: does not lower the worst ratio"
        else:
            assert candidate.verdict == "higher perplexity"
            assert chosen.perplexity is not None
            assert candidate.perplexity > 1.3 * chosen.perplexity


def test_a_prefix_is_made_longer_as_long_as_that_pays(calibration: Calibration, plain: SpikeStatistics) -> None:
    longer = choose_prefix(with_options(calibration, prefix_length=5), plain)
    by_prefix = {candidate.token_ids: candidate for candidate in longer.candidates}
    chain = [by_prefix[longer.token_ids[:length]] for length in range(3, len(longer.token_ids) + 1)]
    assert chain[0].token_ids[2] == SPIKING
    perplexities = [candidate.perplexity for candidate in chain]
    for before, after in pairwise(perplexities):
        assert before is not None
        assert after is not None
        assert after <= before * (1 - 0.002)
    assert len(longer.token_ids) > 3  # here it did pay
    # One more token was tried and did not, or the longest was reached.
    tried = [ids for ids in by_prefix if ids[:-1] == longer.token_ids]
    assert tried or len(longer.token_ids) == 5
    assert longer.forward_tokens > 0


def test_no_prefix_is_longer_than_allowed(calibration: Calibration, plain: SpikeStatistics) -> None:
    short = choose_prefix(with_options(calibration, prefix_length=1), plain)
    assert {len(candidate.token_ids) for candidate in short.candidates} == {0, 1}


def test_behind_the_prefix_the_ratio_is_ordinary(behind: SpikeStatistics, windows: TokenWindows) -> None:
    assert behind.modules[PLANTED_MODULE].ratio < ORDINARY
    assert worst_ratio(behind)[1] < ORDINARY
    # The prefix holds BOS: neither is fed or recorded again.
    np.testing.assert_array_equal(behind.token_ids, windows.calibration)


def test_a_prefix_without_the_spiking_token_does_not_help(calibration: Calibration) -> None:
    control = calibration.measure((BOS, token_of("a"), token_of("b")))
    assert control.modules[PLANTED_MODULE].ratio > 1000


def test_the_prefix_cures_static_int8(
    calibration: Calibration, plain: SpikeStatistics, behind: SpikeStatistics
) -> None:
    for statistics, cured in ((plain, False), (behind, True)):
        score = calibration.predicted(statistics, (), NO_TRANSFORM)
        reference = calibration.reference_perplexity(statistics.prefix_ids)
        assert (score.perplexity < 1.05 * reference) is cured
        assert (score.perplexity > 1.3 * reference) is not cured
        assert (score.divergence < 0.02) is cured


def test_without_bos_or_eos_there_is_no_prefix(calibration: Calibration, plain: SpikeStatistics) -> None:
    config = replace(calibration.checkpoint.config, bos_token_id=None, eos_token_ids=())
    nameless = replace(calibration.checkpoint, config=config, tokenizer=None)
    assert choose_prefix(replace(calibration, checkpoint=nameless), plain) == PrefixChoice()
    np.testing.assert_array_equal(
        replace(calibration, checkpoint=nameless).fed(calibration.windows.calibration, ()),
        calibration.windows.calibration,
    )


def corpus(windows: TokenWindows) -> Corpus:
    return Corpus("sampled", (as_text(windows.calibration),))


@pytest.fixture(scope="module")
def recipe(calibration: Calibration, plain: SpikeStatistics, prefixes: PrefixChoice, windows: TokenWindows) -> Recipe:
    """QFeM and QFeP as one writes them down; the statistics are those without the prefix, to have both at once."""
    options = with_options(calibration, qfem=True, max_fp16_modules=1)
    statistics = replace(plain, prefix_ids=prefixes.token_ids)
    return build_recipe(
        options,
        corpus(windows),
        statistics,
        choose_kept(options, plain, NO_TRANSFORM),
        search=Search(prefixes=prefixes.candidates),
    )


def test_the_recipe_says_what_was_found(recipe: Recipe, plain: SpikeStatistics, prefixes: PrefixChoice) -> None:
    kept = recipe.modules[PLANTED_MODULE]
    assert recipe.kept() == (PLANTED_MODULE,)
    assert (kept.precision, kept.reason, kept.activation_scale) == ("float16", "score > alpha", None)
    assert kept.ratio == plain.modules[PLANTED_MODULE].ratio
    assert recipe.prefix is not None
    assert recipe.prefix_ids == prefixes.token_ids
    assert recipe.prefix.text == f"<s>{chr(prefixes.token_ids[1] - 2)}\n"
    assert set(recipe.modules) == set(linears(CONFIG))
    assert recipe.alpha is not None
    assert (
        ORDINARY
        > recipe.alpha
        >= max(plan.ratio or 0.0 for plan in recipe.modules.values() if plan.precision == "int8")
    )
    assert recipe.search.prefixes == prefixes.candidates
    assert (recipe.model.source, recipe.model.architecture) == ("planted", "llama")


RULES: dict[ActivationRange, Callable[[NDArray[np.float32]], float]] = {
    "max": lambda amax: float(amax.max()),
    "sample-mean": lambda amax: float(np.mean([row.max() for row in amax], dtype=np.float64)),
    "percentile": lambda amax: float(np.quantile(amax.ravel(), 0.999)),
    "mse": lambda amax: float(amax.max()),  # nothing was searched: no clip
}


@pytest.mark.parametrize("rule", RULES)
def test_siblings_share_one_scale_that_covers_what_the_rule_says(
    calibration: Calibration, plain: SpikeStatistics, windows: TokenWindows, rule: ActivationRange
) -> None:
    options = with_options(calibration, activation_range=rule)
    recipe = build_recipe(options, corpus(windows), plain, NOTHING_KEPT)
    for name in representatives(CONFIG):
        scales = {recipe.modules[linear].activation_scale for linear in siblings(name)}
        assert scales == {activation_scale(RULES[rule](plain.modules[name].token_amax))}


def test_the_recipe_round_trips(recipe: Recipe, tmp_path: Path) -> None:
    save_recipe(recipe, tmp_path / "recipe.json")
    assert load_recipe(tmp_path / "recipe.json") == recipe


def test_the_recipe_behind_the_prefix_quantizes_everything(
    calibration: Calibration, behind: SpikeStatistics, windows: TokenWindows
) -> None:
    recipe = build_recipe(calibration, corpus(windows), behind, choose_kept(calibration, behind, NO_TRANSFORM))
    assert recipe.kept() == ()
    assert recipe.alpha is None  # QFeM is off
    assert recipe.prefix is not None
    assert recipe.prefix.ratio == worst_ratio(behind)[1] < ORDINARY


def test_the_same_inputs_give_the_same_recipe(
    checkpoint: Checkpoint,
    windows: TokenWindows,
    calibration: Calibration,
    recipe: Recipe,
    prefixes: PrefixChoice,
) -> None:
    options = replace(calibration.options, qfem=True, max_fp16_modules=1)
    again = Calibration(checkpoint, windows, options)
    plain = again.measure(())
    built = build_recipe(
        again,
        corpus(windows),
        replace(plain, prefix_ids=prefixes.token_ids),
        choose_kept(again, plain, NO_TRANSFORM),
        search=Search(prefixes=prefixes.candidates),
    )
    assert built == recipe


def test_text_and_tokens_are_the_same(checkpoint: Checkpoint, windows: TokenWindows) -> None:
    tokenizer: Any = checkpoint.tokenizer
    encoded = tokenizer.backend_tokenizer.encode(as_text(windows.calibration), add_special_tokens=False).ids
    np.testing.assert_array_equal(encoded, windows.calibration.ravel())
