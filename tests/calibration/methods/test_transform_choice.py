"""The search for smoothing and clips, the choice between transforms, and the guard against float16's overflow."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks.accuracy.table import simulated_perplexity
from spike_export.artifacts.errors import RecipeError
from spike_export.artifacts.recipe import Dtype, HadamardPlan, ModulePlan, Recipe
from spike_export.calibration.corpus.corpus import Corpus
from spike_export.calibration.corpus.token_windows import TokenWindows
from spike_export.calibration.decoder.equivalent.equivalent_weights import transformed_checkpoint
from spike_export.calibration.decoder.equivalent.smoothing import plan_scales, smoothing_plan, smoothing_scales
from spike_export.calibration.decoder.layerwise import Decoder
from spike_export.calibration.decoder.perplexity import Likelihood, Score, window_scores
from spike_export.calibration.decoder.simulate import QuantizedWeights, Simulation
from spike_export.calibration.methods import smoothing_search, transform_choice
from spike_export.calibration.methods.context import NO_TRANSFORM, Calibration, channel_scales, module_plans
from spike_export.calibration.methods.module_choice import NOTHING_KEPT
from spike_export.calibration.methods.options import CalibrationOptions
from spike_export.calibration.methods.overflow_guard import (
    FLOAT16_MAX,
    HEADROOM,
    module_dtype,
    near_limit,
    stream_dtype,
)
from spike_export.calibration.methods.prefix_choice import choose_prefix
from spike_export.calibration.methods.qfem import ModuleChoice
from spike_export.calibration.methods.qfep import worst_ratio
from spike_export.calibration.methods.smoothing_search import (
    CLIPS,
    SiteChoice,
    SmoothingSearch,
    TokenChoice,
    _Rows,
    default_smoothing,
)
from spike_export.calibration.methods.transform_choice import HADAMARD_WORTH, choose_transform
from spike_export.calibration.recipe_writer import build_recipe
from spike_export.calibration.statistics.spikes import ModuleSpikes, SpikeStatistics
from spike_export.checkpoint.modules import block_inputs, input_sites, is_router, representatives, siblings, split_name
from spike_export.engines.accuracy.distances import likelihood
from spike_export.engines.onnx_runtime.session import open_bundle
from spike_export.export.bundle import ExportOptions, export_bundle
from tests.support.tiny.families import NAMES, replaced, tiny_family, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

CORPUS = Corpus("test", ("text",))
DOWN = "model.layers.1.mlp.down_proj"
OUTLIER = 7
PREFIX = (0, 7)


def calibration_of(name: str = "llama", *, outlier: float = 1.0, **options: Any) -> Calibration:
    """A tiny model; one channel of one down_proj's input is `outlier` times larger, its columns as much smaller.

    Without a Hadamard transform, at run time or of the value heads, unless the options say otherwise.
    """
    checkpoint = tiny_family(name).checkpoint
    if outlier != 1:
        up, down = (f"model.layers.1.mlp.{linear}.weight" for linear in ("up_proj", "down_proj"))
        larger, smaller = checkpoint.tensor(up).copy(), checkpoint.tensor(down).copy()
        larger[OUTLIER] *= outlier
        smaller[:, OUTLIER] /= outlier
        checkpoint = replaced(checkpoint, {up: larger, down: smaller})
    content = tokens(rows=18, length=24)
    windows = TokenWindows(content[:12], content[12:])
    options = {"hadamard": "never", "value_rotation": "never", "dtype": "float32", **options}
    return Calibration(checkpoint, windows, CalibrationOptions(samples=12, length=25, **options))


def searched(calibration: Calibration, smoothing: bool, statistics: SpikeStatistics) -> dict[str, SiteChoice]:
    fed = calibration.fed(calibration.search_windows, statistics.prefix_ids)
    search = SmoothingSearch(
        config=calibration.checkpoint.config,
        statistics=statistics,
        compared=calibration.held_out(statistics),
        weights=calibration.options.weights,
        activations=calibration.options.searched_activations,
        activation_range=calibration.options.activation_range,
        smoothing=smoothing,
        rotated=False,
        stride=1,
    )
    calibration.model.decoder.run(fed, statistics.prefix_ids, visits=(search.visit,))
    return search.choices


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("activations", ["static", "per-token"])
def test_a_search_never_adds_noise(name: str, activations: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = calibration_of(name, activations=activations, activation_range="mse")
    statistics = calibration.measure(())
    chosen = searched(calibration, True, statistics)
    clipped = searched(calibration, False, statistics)
    monkeypatch.setattr("spike_export.calibration.methods.smoothing_search.CLIPS", (1.0,))
    plain = searched(calibration, False, statistics)
    sites = [site for site in input_sites(calibration.checkpoint.config) if not is_router(site.representative)]
    assert chosen.keys() == clipped.keys() == plain.keys()
    assert len(chosen) == 4 * len(sites)
    for layer in range(4):
        for producer in {site.producer for site in sites}:
            names = [f"model.layers.{layer}.{site.representative}" for site in sites if site.producer == producer]
            noise = [sum(choices[each].noise for each in names) for choices in (chosen, clipped, plain)]
            assert 0 < noise[0] <= noise[1] <= noise[2]
            # The inputs behind one norm share its scales: the very same plan.
            assert len({id(chosen[each].smoothing) for each in names}) == 1
    assert {choice.smoothing for choice in (*clipped.values(), *plain.values())} == {None}
    assert {choice.clip for choice in plain.values()} == {1.0}
    assert {choice.clip for choice in chosen.values()} <= (set(CLIPS) if activations == "static" else {1.0})
    assert any(choice.smoothing for choice in chosen.values())


@pytest.mark.parametrize("prefix", [(), PREFIX])
def test_an_outlier_channel_is_smoothed_away(prefix: tuple[int, ...]) -> None:
    calibration = calibration_of(outlier=200.0)
    statistics = calibration.measure(prefix)
    channels = statistics.modules[DOWN].channel_amax
    assert channels[OUTLIER] > 50 * np.median(channels)
    choice = choose_transform(calibration, statistics)
    plan = choice.transform.smoothing[DOWN]
    scales = plan_scales(plan)
    assert scales.argmax() == OUTLIER
    assert scales[OUTLIER] > 5 * np.median(scales)
    plain = calibration.predicted(statistics, (), NO_TRANSFORM)
    smoothed = calibration.predicted(statistics, (), choice.transform)
    assert smoothed.divergence < plain.divergence / 3
    # The outlier ruins its layer; elsewhere nothing was wrong.
    others = {name: plan for name, plan in choice.transform.smoothing.items() if name != DOWN}
    without = calibration.predicted(statistics, (), replace(choice.transform, smoothing=others))
    assert without.divergence > 2 * smoothed.divergence
    assert [candidate.verdict for candidate in choice.candidates] == ["chosen"]
    assert choice.candidates[0].divergence < plain.divergence / 3


def test_the_noise_of_an_input_counts_as_much_as_its_block_in_the_residual_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calibration = calibration_of()
    statistics = calibration.measure(())

    def noise() -> dict[str, float]:
        return {name: choice.noise for name, choice in searched(calibration, False, statistics).items()}

    measured = noise()
    monkeypatch.setattr(_Rows, "share", lambda *_: 1.0)
    alone = noise()
    monkeypatch.setattr(_Rows, "share", lambda *_: 0.25)
    quarter = noise()
    # The products of o_proj and down_proj are the block's output itself, and are compared with the stream already.
    behind_linear = {site.representative: site.behind_linear for site in input_sites(calibration.checkpoint.config)}
    for name in measured:
        counts_fully = behind_linear[split_name(name)[1]]
        assert quarter[name] == (1.0 if counts_fully else 0.25) * alone[name]
        assert (measured[name] == alone[name]) == counts_fully


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text", "olmo2"])
def test_the_noise_is_what_the_residual_stream_receives(name: str) -> None:
    """Of down_proj: nothing of the layer stands between its block's output, behind a norm or not, and the stream."""
    calibration = calibration_of(name, activations="per-token")
    statistics = calibration.measure(())
    noise = searched(calibration, False, statistics)[DOWN].tokens.noise
    fed = calibration.fed(calibration.search_windows, ())
    plan = {DOWN: ModulePlan(precision="int8", activations="per-token")}
    outputs: dict[str, list[torch.Tensor]] = {"plain": [], "quantized": []}

    @contextmanager
    def kept(place: str, index: int, layer: torch.nn.Module) -> Iterator[None]:
        handle = layer.register_forward_hook(lambda *call: outputs[place].append(call[2].double()))
        yield
        handle.remove()
        if index != split_name(DOWN)[0]:
            outputs[place].clear() if index < split_name(DOWN)[0] else outputs[place].pop()

    decoder = calibration.model.decoder
    decoder.run(fed, (), visits=(partial(kept, "plain"),))
    decoder.run(
        fed, (), visits=(partial(kept, "quantized"), Simulation(plan, QuantizedWeights("int8-per-channel")).visit)
    )
    plain, quantized = (torch.cat(found) for found in outputs.values())
    received = ((quantized - plain).square().sum(-1) / plain.square().sum(-1)).mean()
    # Exact without a norm. A norm's gains and the part of the error along its input move a fifth at most.
    assert noise == pytest.approx(float(received), rel=1e-4 if name == "llama" else 0.2)


def test_the_prediction_from_ranges_is_that_of_the_smoothed_model() -> None:
    calibration = calibration_of(outlier=200.0, activation_range="max")
    statistics = calibration.measure(())
    transform = choose_transform(calibration, statistics).transform
    after = calibration.measure((), transform)
    config = calibration.checkpoint.config
    predicted = module_plans(statistics, (), transform, calibration.options, channel_scales(transform, config))
    measured = module_plans(after, (), transform, calibration.options)
    assert predicted.keys() == measured.keys()
    for name, plan in measured.items():
        # float32 rounding of the folded weights.
        assert predicted[name].activation_scale == pytest.approx(plan.activation_scale, rel=1e-4), name
    ours = calibration.predicted(statistics, (), transform)
    theirs = calibration.predicted(after, (), transform, measured=True)
    assert ours.perplexity == pytest.approx(theirs.perplexity, rel=5e-3)


def test_candidates_are_judged_on_windows_that_their_scales_do_not_come_from() -> None:
    calibration = calibration_of()
    statistics = calibration.measure(())
    held = calibration.held_out(statistics)
    assert calibration.search_rows.tolist() == [0, 4, 8]
    assert held.sample_ids.tolist() == [row for row in range(12) if row not in (0, 4, 8)]
    few = replace(calibration, windows=replace(calibration.windows, calibration=calibration.windows.calibration[:3]))
    assert few.search_rows.tolist() == [0, 1, 2]
    few_statistics = few.measure(())
    assert few.held_out(few_statistics) is few_statistics


def test_another_kind_of_text_judges_than_the_scales_come_from() -> None:
    one = calibration_of()
    mixed = replace(one, windows=replace(one.windows, kinds=np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2])))
    statistics = mixed.measure(())
    assert mixed.search_rows.tolist() == [0, 1, 2, 3, 4]
    assert mixed.held_out(statistics).sample_ids.tolist() == [5, 6, 7, 8, 9, 10, 11]
    assert mixed.prefix_rows.tolist() == [5, 6, 8, 9, 11]
    assert one.prefix_rows.tolist() == one.search_rows.tolist()
    entered = choose_prefix(mixed, statistics).candidates[0]
    expected = mixed.measure_windows(mixed.windows.calibration[[5, 6, 8, 9, 11]], mixed.prefix_rows, ())
    assert (entered.worst_module, entered.ratio) == worst_ratio(expected)


def test_the_winners_scales_are_made_of_all_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = tuple(each for each in smoothing_search.CANDIDATES if each[0] != "smoothquant-typical")
    monkeypatch.setattr(smoothing_search, "CANDIDATES", largest)
    calibration = calibration_of(outlier=200.0)
    statistics = calibration.measure(())
    assert 0 in calibration.search_rows
    down = statistics.modules[DOWN]
    channels = down.sample_channel_amax.copy()
    quiet = int(channels.max(axis=0).argmin())
    channels[0, quiet] = 10 * channels.max()  # only a window on which candidates are compared has it
    statistics = replace(statistics, modules={**statistics.modules, DOWN: replace(down, sample_channel_amax=channels)})
    choice = searched(calibration, True, statistics)[DOWN]
    assert choice.smoothing is not None
    assert choice.final is not None
    assert (choice.smoothing.form, choice.smoothing.parameter) == (choice.final.form, choice.final.parameter)
    compared, final = plan_scales(choice.smoothing), plan_scales(choice.final)
    assert final[quiet] > 3 * compared[quiet]
    inputs, weights = statistics.modules[DOWN].channel_amax, calibration.column_amax(DOWN)
    scales = smoothing_scales(choice.final.form, choice.final.parameter, np.maximum(inputs, np.median(inputs)), weights)
    assert choice.final == smoothing_plan(choice.final.form, choice.final.parameter, scales)
    chosen = choose_transform(calibration, statistics)
    assert DOWN in chosen.kinds.per_token
    assert chosen.transform.smoothing[DOWN] == choice.tokens.final != choice.final
    static = calibration.with_options(replace(calibration.options, activations="static"))
    assert choose_transform(static, statistics).transform.smoothing[DOWN] == choice.final


def test_typical_magnitudes_are_means_of_the_windows_maxima_and_of_the_columns_squares(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calibration = calibration_of(outlier=200.0)
    statistics = calibration.measure(())
    monkeypatch.setattr(smoothing_search, "CANDIDATES", (("smoothquant-typical", 0.4),))
    choice = searched(calibration, True, statistics)[DOWN]
    inputs = statistics.modules[DOWN].sample_channel_amax.mean(axis=0)
    weight = calibration.checkpoint.tensor(f"{DOWN}.weight")
    scales = np.maximum(inputs, np.median(inputs)) ** 0.4 / np.sqrt(np.mean(weight**2, axis=0)) ** 0.6
    assert choice.final == smoothing_plan("smoothquant-typical", 0.4, scales.astype(np.float32))


@pytest.mark.parametrize(("name", "outlier"), [("llama", 200.0), ("mixtral", 1.0)])
def test_inputs_with_a_scale_per_token_are_smoothed_for_that(name: str, outlier: float) -> None:
    """What a search for scales per token everywhere finds; inputs that share a norm keep the scales of constants."""
    static, own = (
        searched(calibration, True, calibration.measure(()))
        for calibration in (calibration_of(name, outlier=outlier, activations=kind) for kind in ("static", "per-token"))
    )
    sites = [site for site in input_sites(tiny_family(name).checkpoint.config) if not is_router(site.representative)]
    shared = {each.representative for each in sites if sum(each.producer == other.producer for other in sites) > 1}
    for module, choice in static.items():
        if split_name(module)[1] in shared:
            assert (choice.tokens.smoothing, choice.tokens.final) == (choice.smoothing, choice.final)
        else:
            expected = own[module]
            assert choice.tokens == TokenChoice(expected.smoothing, expected.final, expected.noise)
    assert any(choice.tokens.smoothing != choice.smoothing for choice in static.values())


def test_rotations_compete_where_they_may() -> None:
    calibration = calibration_of(rotation="auto")
    choice = choose_transform(calibration, calibration.measure(()))
    names = [candidate.name for candidate in choice.candidates]
    assert names == ["smoothing", "hadamard, seed 0", "hadamard, seed 1"] or names[1].startswith("orthogonal")
    assert len(names) == 3
    assert sorted(candidate.verdict for candidate in choice.candidates)[0] == "chosen"
    best = min(choice.candidates, key=lambda candidate: candidate.divergence)
    assert best.verdict == "chosen"


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_hadamard_transform_spreads_an_outlier(name: str) -> None:
    """It wins without smoothing, which it comes behind, and its ranges are those of the transformed inputs."""
    constants: Any = {"hadamard": "down_proj", "activations": "static"}
    calibration = calibration_of(outlier=2000.0, smoothing=False, activation_range="mse", **constants)
    if name == "mixtral":
        calibration = calibration_of(name, **constants)
    choice = choose_transform(calibration, calibration.measure(()))
    assert choice.transform.hadamard == HadamardPlan(block=16)
    scores = {each.name: each.divergence for each in choice.candidates}
    if name == "llama":
        assert scores["none + Hadamard"] < 0.75 * scores["none"]
    after = calibration.measure((), choice.transform.of_weights)
    plans = module_plans(after, (), choice.transform, calibration.options)
    predicted = calibration.predicted(calibration.held_out(after), (), choice.transform, measured=True)
    assert predicted.divergence < 1.5 * scores[choice.candidates[-1].name]
    equivalent = transformed_checkpoint(calibration.checkpoint, choice.transform)
    simulation = Simulation(plans, QuantizedWeights("int8-per-channel"))
    fed = calibration.fed(calibration.search_windows, ())
    reference = calibration.reference(calibration.search_windows, ())
    found = Score.of(window_scores(Decoder(equivalent), fed, 24, (), (simulation.visit,), reference=reference))
    assert found.divergence < 2 * predicted.divergence


@pytest.mark.parametrize("name", ["llama", "mixtral", "phi3", "olmo2", "gemma2"])
def test_inputs_of_blocks_pass_a_transform_where_it_suits_them(name: str) -> None:
    """Channels of a norm's output are large, a few at a time: without smoothing only the transform levels them."""
    plain = calibration_of(name, smoothing=False, activation_range="mse")
    attention, feed_forward = block_inputs(plain.checkpoint.config)
    calibration = replace(plain, options=replace(plain.options, hadamard="auto"))
    choice = choose_transform(calibration, calibration.measure(()))
    assert [each.name for each in choice.candidates] == ["none", "none + Hadamard", "none + Hadamard at every input"]
    costs = [each.divergence / (1 - HADAMARD_WORTH) ** count for count, each in enumerate(choice.candidates)]
    taken = costs.index(min(costs)) == 2
    assert [each.verdict == "chosen" for each in choice.candidates] == [cost == min(costs) for cost in costs]
    inside = {split_name(each)[1] for each in choice.transform.input_hadamard}
    assert inside <= {attention, feed_forward}
    assert bool(inside) == taken
    assert set(choice.transform.input_hadamard.values()) <= {16}
    found = transform_choice._searched(calibration, calibration.measure(()), None, lambda *_: None)
    for site, each in found.choices.items():
        if split_name(site)[1] in (attention, feed_forward):
            assert each.transformed is not None
            assert each.block is None
            assert each.transformed.noise <= each.noise
            assert (each.transformed.block == 16) == (each.transformed.noise < each.noise)
            assert each.transformed.tokens.noise <= each.tokens.noise


def test_transforms_compete_with_the_scales_per_token_that_they_would_get() -> None:
    calibration = calibration_of(hadamard="auto")
    choice = choose_transform(calibration, calibration.measure(()))
    _, mixed = choice.kinds.candidates
    (chosen,) = (each for each in choice.candidates if each.verdict == "chosen")
    assert choice.kinds.per_token
    assert (mixed.perplexity, mixed.divergence) == (chosen.perplexity, chosen.divergence)
    static = replace(calibration, options=replace(calibration.options, activations="static"))
    constants = choose_transform(static, calibration.measure(())).candidates
    assert all(each.divergence != other.divergence for each, other in zip(constants, choice.candidates, strict=True))


def with_large_channels(calibration: Calibration) -> Calibration:
    """Two channels behind every norm are ten times larger, and their columns as much smaller."""
    checkpoint, tensors = calibration.checkpoint, {}
    norms = {"input_layernorm": "self_attn.q_proj", "post_attention_layernorm": "mlp.up_proj"}
    for layer, (norm, representative) in product(range(checkpoint.config.num_hidden_layers), norms.items()):
        gain = f"model.layers.{layer}.{norm}.weight"
        tensors[gain] = checkpoint.tensor(gain).copy()
        tensors[gain][[3, 20]] *= 10.0
        for reader in siblings(f"model.layers.{layer}.{representative}"):
            tensors[f"{reader}.weight"] = checkpoint.tensor(f"{reader}.weight").copy()
            tensors[f"{reader}.weight"][:, [3, 20]] /= 10.0
    return replace(calibration, checkpoint=replaced(checkpoint, tensors))


def test_a_transform_levels_large_channels_of_norms() -> None:
    """What it is chosen for is what the model behind it is worth, with ranges of its own statistics."""
    plain = with_large_channels(calibration_of(smoothing=False, activation_range="mse"))
    calibration = replace(plain, options=replace(plain.options, hadamard="auto"))
    statistics = calibration.measure(())
    choice = choose_transform(calibration, statistics)
    assert [each.verdict == "chosen" for each in choice.candidates] == [False, False, True]
    assert choice.candidates[2].divergence < choice.candidates[1].divergence / 2
    site = "model.layers.1.self_attn.q_proj"
    assert choice.transform.input_hadamard[site] == 16
    after = calibration.measure((), choice.transform.of_weights)
    before, behind = (each.modules[site].channel_amax for each in (statistics, after))
    assert behind.max() / np.median(behind) < before.max() / np.median(before) / 2
    predicted = calibration.predicted(calibration.held_out(after), (), choice.transform, measured=True)
    assert predicted.divergence < 1.5 * choice.candidates[2].divergence < choice.candidates[0].divergence
    # What is asked for is compared, and nothing beyond it.
    alone = replace(calibration, options=replace(calibration.options, hadamard="down_proj"))
    assert len(choose_transform(alone, statistics).candidates) == 2
    always = replace(calibration, options=replace(calibration.options, hadamard="always"))
    (only,) = choose_transform(always, statistics).candidates
    assert only == choice.candidates[2]


def spiked_values() -> Calibration:
    """One value channel of layer 1 is large, but seldom so: its head's other channels are as good as nothing to it."""
    calibration = calibration_of(value_rotation="auto", smoothing=False, activation_range="mse")
    name = "model.layers.1.self_attn.v_proj.weight"
    larger = calibration.checkpoint.tensor(name).copy()
    larger[5] *= 30.0
    return replace(calibration, checkpoint=replaced(calibration.checkpoint, {name: larger}))


def test_rotated_value_heads_compete_in_each_layer() -> None:
    calibration = spiked_values()
    statistics = calibration.measure(())
    without = replace(calibration, options=replace(calibration.options, value_rotation="never"))
    chosen, plain = (choose_transform(each, statistics).transform for each in (calibration, without))
    output = "model.layers.1.self_attn.o_proj"
    assert chosen.value_rotation[output] == 16
    assert plain.value_rotation == {}
    # Of each layer the better one is taken, and the choice names what is better.
    assert chosen.noise[output] < plain.noise[output] / 2
    for name in (name for name in plain.noise if name.endswith("o_proj")):
        better = chosen.noise[name] < plain.noise[name]
        assert better == (name in chosen.value_rotation)
        assert better or chosen.noise[name] == plain.noise[name]
    rotated, as_it_was = (
        calibration.predicted(calibration.measure((), each), (), each, measured=True) for each in (chosen, plain)
    )
    assert rotated.divergence < as_it_was.divergence
    # Each kind of scale has its own choice: that of inputs with a scale per token may leave the heads as they are.
    tokens = choose_transform(
        replace(calibration, options=replace(calibration.options, activations="per-token")), statistics
    )
    assert all(block == 16 for block in tokens.transform.value_rotation.values())
    assert tokens.transform.noise[output] <= plain.token_noise[output]


def test_a_rotation_that_is_demanded_takes_the_norms_place() -> None:
    calibration = calibration_of(rotation="always")
    choice = choose_transform(calibration, calibration.measure(()))
    assert choice.transform.rotation is not None
    inner = {split_name(name)[1] for name in choice.transform.smoothing}
    assert inner <= {"self_attn.o_proj", "mlp.down_proj"}


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "olmo2"])
def test_a_family_that_cannot_be_rotated(name: str) -> None:
    calibration = calibration_of(name, rotation="always")
    statistics = calibration.measure(())
    with pytest.raises(RecipeError, match=f"--rotation always: {name} cannot be rotated: "):
        choose_transform(calibration, statistics)
    automatic = calibration.with_options(replace(calibration.options, rotation="auto"))
    assert [each.name for each in choose_transform(automatic, statistics).candidates] == ["smoothing"]


def test_inputs_that_no_norm_makes_are_searched_for_clips_but_not_smoothed() -> None:
    calibration = calibration_of("olmo2")
    statistics, config = calibration.measure(()), calibration.checkpoint.config
    choice = choose_transform(calibration, statistics)
    fixed = default_smoothing(statistics, config, calibration.column_amax, rotated=False)
    smoothable = {"self_attn.o_proj", "mlp.down_proj"}
    assert {split_name(name)[1] for name in choice.transform.smoothing} <= smoothable
    assert {split_name(name)[1] for name in fixed} == smoothable
    assert set(choice.transform.clips) == set(representatives(config))


def test_without_a_search_nothing_is_transformed() -> None:
    calibration = calibration_of(smoothing=False, activation_range="max")
    choice = choose_transform(calibration, calibration.measure(()))
    assert choice.transform == NO_TRANSFORM
    assert choice.candidates == ()


def peaked(stream: float, module: float, operand: float = 1.0) -> SpikeStatistics:
    def spikes(peak: float) -> ModuleSpikes:
        amax = np.full((1, 4), peak, np.float32)
        return ModuleSpikes(amax, amax, np.array([peak], np.float32))

    tame = "model.layers.0.mlp.down_proj"
    attention = {"model.layers.0.self_attn": np.array([[1.0, operand, 1.0]], np.float32)}
    hidden = np.array([[1.0, stream]], np.float32)
    ids: NDArray[np.int64] = np.zeros((1, 4), np.int64)
    return SpikeStatistics({tame: spikes(2.0), DOWN: spikes(module)}, ids, (), np.zeros(1, np.int64), hidden, attention)


def built(statistics: SpikeStatistics, dtype: Dtype, kept: tuple[str, ...] = (DOWN,)) -> Recipe:
    calibration = calibration_of()
    calibration = calibration.with_options(replace(calibration.options, dtype=dtype))
    return build_recipe(calibration, CORPUS, statistics, ModuleChoice(1.0, kept))


def test_a_kept_module_near_the_limit_is_float32_and_the_stream_bfloat16() -> None:
    recipe = built(peaked(stream=40_000, module=40_000), "float16")
    plan = recipe.modules[DOWN]
    assert recipe.scheme.unquantized == "bfloat16"
    assert recipe.scheme.unquantized_reason == "peaks of 40,000 near float16's limit of 65,504"
    assert recipe.notes() == (
        "everything that is not quantized is bfloat16: peaks of 40,000 near float16's limit of 65,504",
    )
    # bfloat16 ends where float32 does: the module needs nothing more.
    assert (plan.precision, plan.reason) == ("bfloat16", "score > alpha")


def test_a_kept_modules_input_alone_near_the_limit() -> None:
    statistics = peaked(stream=100, module=40_000)
    spikes = statistics.modules[DOWN]
    quiet = replace(spikes, output_amax=np.ones(1, np.float32))
    recipe = built(replace(statistics, modules={**statistics.modules, DOWN: quiet}), "float16")
    plan = recipe.modules[DOWN]
    assert (plan.precision, plan.reason) == (
        "float32",
        "score > alpha; peak 40,000 near float16's limit of 65,504",
    )
    assert (recipe.scheme.unquantized, recipe.scheme.unquantized_reason) == ("float16", None)


@pytest.mark.parametrize("place", ["stream", "operand", "output"])
def test_whatever_float16_has_to_hold_is_guarded(place: str) -> None:
    peaks: Mapping[str, float] = {"stream": 1.0, "module": 1.0, "operand": 1.0}
    peaks = {**peaks, "module" if place == "output" else place: 33_000.0}
    dtype, reason = stream_dtype("float16", peaked(**peaks))
    assert dtype == "bfloat16"
    assert reason is not None
    assert "33,000" in reason


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_below_the_limit_nothing_changes(dtype: Dtype) -> None:
    recipe = built(peaked(stream=32_000, module=32_000, operand=32_000), dtype)
    assert recipe.modules[DOWN].precision == dtype
    assert recipe.modules[DOWN].reason == "score > alpha"
    assert (recipe.scheme.unquantized, recipe.scheme.unquantized_reason) == (dtype, None)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_only_float16_overflows(dtype: Dtype) -> None:
    assert module_dtype(dtype, 1e9) == (dtype, None)
    assert stream_dtype(dtype, peaked(1e9, 1e9, 1e9)) == (dtype, None)
    assert not near_limit(FLOAT16_MAX / HEADROOM)
    assert near_limit(FLOAT16_MAX / HEADROOM + 1)


SCHEMES: Mapping[str, Mapping[str, Any]] = {
    "static": {"smoothing": False, "activation_range": "max"},
    "static, clipped": {"smoothing": False, "activation_range": "mse"},
    "dynamic": {"activations": "per-token", "smoothing": False},
    "W8A16": {"excluded_weights": "int8", "smoothing": False, "activation_range": "max"},
    "attention": {"attention": "int8-per-tensor-static", "smoothing": False, "activation_range": "max"},
    "smoothing": {},
    "rotation": {"rotation": "always"},
    "all": {"rotation": "always", "attention": "int8-per-tensor-static", "excluded_weights": "int8"},
}


@pytest.mark.parametrize("prefix", [(), PREFIX])
@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_predicted_is_what_onnx_runtime_computes(name: str, prefix: tuple[int, ...], tmp_path: Path) -> None:
    calibration = calibration_of(outlier=50.0, **SCHEMES[name])
    behind = calibration.measure(prefix)
    transform = choose_transform(calibration, behind).transform
    after = calibration.measure(prefix, transform) if transform.changes_weights else behind
    kept = (
        ModuleChoice(1.0, (DOWN, "model.layers.2.self_attn.q_proj"))
        if "W8A16" in name or name == "all"
        else NOTHING_KEPT
    )
    recipe = build_recipe(calibration, CORPUS, after, kept, transform)
    assert len(recipe.kept()) == (sum(len(siblings(each)) for each in kept.kept))
    export_bundle(calibration.checkpoint, recipe, ExportOptions("float32"), tmp_path / "bundle")
    session = open_bundle(tmp_path / "bundle")
    measured = Likelihood(0.0, 0)
    for window in calibration.windows.evaluation:
        measured += likelihood(session.prefill(window[None])[0, :-1], window[1:])
    predicted = simulated_perplexity(calibration, recipe)
    assert measured.perplexity == pytest.approx(predicted, rel=0.005)
    # Without the scheme it is another figure: something was quantized.
    assert abs(simulated_perplexity(calibration, None) / predicted - 1) > 1e-5
