"""One calibration pass: no division of the work changes it, faults are named, experts see their own tokens only."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from spike_export.artifacts.errors import ArtifactError, CalibrationError
from spike_export.artifacts.recipe import UNREACHED
from spike_export.calibration.decoder.layers import attention
from spike_export.calibration.decoder.layers.attention import attend
from spike_export.calibration.decoder.layerwise import BATCH_TOKENS, Decoder
from spike_export.calibration.methods.context import NO_TRANSFORM, module_plans
from spike_export.calibration.methods.options import CalibrationOptions
from spike_export.calibration.methods.overflow_guard import stream_dtype
from spike_export.calibration.statistics.measure import (
    _maxima,
    _require_finite,
    _routed_maxima,
    _sample_amax,
    measure_spikes,
)
from spike_export.calibration.statistics.spikes import ModuleSpikes, SpikeStatistics, merge_statistics
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.checkpoint.modules import representatives
from tests.support.tiny.families import replaced, tiny_family, tokens, with_unreached_expert
from tests.support.tiny.models import TinyModel, tiny_recipe

PREFIX = (1, 7)
MOE = "block_sparse_moe"
EMBEDDING = "model.embed_tokens.weight"


def assert_identical(actual: SpikeStatistics, expected: SpikeStatistics) -> None:
    assert list(actual.modules) == list(expected.modules)
    for name, spikes in expected.modules.items():
        for array in ("token_amax", "sample_channel_amax", "output_amax"):
            np.testing.assert_array_equal(getattr(actual.modules[name], array), getattr(spikes, array), name)
    for array in ("token_ids", "sample_ids", "hidden_amax"):
        np.testing.assert_array_equal(getattr(actual, array), getattr(expected, array), array)
    assert actual.prefix_ids == expected.prefix_ids
    assert list(actual.operand_amax) == list(expected.operand_amax)
    for name, operands in expected.operand_amax.items():
        np.testing.assert_array_equal(actual.operand_amax[name], operands)


def part(whole: SpikeStatistics, rows: list[int]) -> SpikeStatistics:
    """Return the record of some samples."""
    modules = {
        name: ModuleSpikes(spikes.token_amax[rows], spikes.sample_channel_amax[rows], spikes.output_amax[rows])
        for name, spikes in whole.modules.items()
    }
    return SpikeStatistics(
        modules,
        whole.token_ids[rows],
        whole.prefix_ids,
        whole.sample_ids[rows],
        whole.hidden_amax[rows],
        {name: operands[rows] for name, operands in whole.operand_amax.items()},
    )


def random_statistics(samples: int = 7) -> SpikeStatistics:
    random = np.random.default_rng(0)

    def draw(*shape: int) -> NDArray[np.float32]:
        return random.uniform(0.1, 9, shape).astype(np.float32)

    modules = {name: ModuleSpikes(draw(samples, 5), draw(samples, 3), draw(samples)) for name in ("a", "b")}
    modules["b"].token_amax[2] = np.nan
    return SpikeStatistics(
        modules,
        random.integers(0, 99, (samples, 5)),
        PREFIX,
        np.array([0, 1, 2, 5, 6, 9, 11][:samples]),
        draw(samples, 2),
        {"x.self_attn": draw(samples, 3)},
    )


WHOLE = random_statistics()


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=7, max_size=7), st.permutations(range(4)), st.integers(1, 3))
def test_any_order_and_grouping_of_parts_merge_to_the_whole(owner: list[int], order: list[int], split: int) -> None:
    parts = [part(WHOLE, [row for row in range(7) if owner[row] == shard]) for shard in order if shard in owner]
    assert_identical(merge_statistics(parts), WHOLE)
    groups = [group for group in (parts[:split], parts[split:]) if group]
    assert_identical(merge_statistics([merge_statistics(group) for group in groups]), WHOLE)
    assert merge_statistics(parts).ratios() == WHOLE.ratios()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (part(WHOLE, [2, 4]), "window 2 is in more than one of the spike statistics"),
        (replace(part(WHOLE, [4]), prefix_ids=(1, 8)), "different models or prefixes cannot be merged"),
        (replace(part(WHOLE, [4]), modules={"a": WHOLE.modules["a"]}), "different models or prefixes"),
        (replace(part(WHOLE, [4]), token_ids=np.zeros((1, 6), np.int64)), "windows of different lengths"),
    ],
)
def test_what_does_not_belong_together_is_refused(other: SpikeStatistics, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        merge_statistics([part(WHOLE, [0, 1, 2]), other])


@pytest.mark.parametrize("ids", [[3, 2], [2, 2]])
def test_sample_ids_ascend(ids: list[int]) -> None:
    with pytest.raises(ValueError, match="sample ids must ascend"):
        replace(part(WHOLE, [0, 1]), sample_ids=np.array(ids))


@pytest.mark.parametrize("name", ["llama", "mistral", "mixtral", "phi3"])
def test_shards_of_a_calibration_merge_to_the_whole(name: str) -> None:
    checkpoint, windows = tiny_family(name).checkpoint, tokens(rows=6)
    whole = measure_spikes(Decoder(checkpoint), windows, PREFIX)
    shards = []
    for rows in ([4], [0, 3, 5], [1, 2]):
        ids = np.array(rows, np.int64)
        shards.append(measure_spikes(Decoder(checkpoint), windows[rows], PREFIX, sample_ids=ids))
    assert_identical(merge_statistics(shards), whole)


def test_a_shard_may_miss_an_expert_that_the_whole_reaches() -> None:
    decoder, windows = Decoder(tiny_family("mixtral").checkpoint), tokens(rows=6)
    missed = measure_spikes(decoder, windows[[4]], PREFIX)
    unreached = [name for name, spikes in missed.modules.items() if not spikes.reached]
    assert unreached  # else this test says nothing
    spikes = missed.modules[unreached[0]]
    assert (spikes.amax, spikes.ratio, spikes.sketch.count, missed.top_tokens(unreached[0], 8)) == (0.0, 1.0, 0, [])
    assert all(spikes.reached for spikes in measure_spikes(decoder, windows, PREFIX).modules.values())


def assert_equal_but_for_rounding(actual: NDArray[np.float32], expected: NDArray[np.float32], terms: int) -> None:
    """Allow what another order of summation may change in float32.

    The error of a sum is a share of its largest terms, so that it may be any share of what is left where they cancel:
    a bound must be relative to the tensor's largest value. With `terms` terms, the most that one product of the model
    adds up, it is at most `terms` * eps of that (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).
    Measured with 1 and 2 threads and with kernels for SSE4, AVX and AVX2: 6 * eps.
    """
    largest = np.abs(expected[np.isfinite(expected)]).max(initial=0)  # NaN stands for tokens an expert never saw
    atol = terms * np.finfo(np.float32).eps * largest
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_batches_of_several_windows_agree_but_for_rounding(name: str) -> None:
    decoder, windows = Decoder(tiny_family(name).checkpoint), tokens(rows=6)
    terms = decoder.config.intermediate_size
    one = measure_spikes(decoder, windows, PREFIX)
    for batch_tokens in (48, 96, BATCH_TOKENS):  # 96: the last batch is smaller
        many = measure_spikes(decoder, windows, PREFIX, batch_tokens=batch_tokens)
        for module, spikes in one.modules.items():
            for array in ("token_amax", "sample_channel_amax", "output_amax"):
                assert_equal_but_for_rounding(getattr(many.modules[module], array), getattr(spikes, array), terms)
        assert_equal_but_for_rounding(many.hidden_amax, one.hidden_amax, terms)
        np.testing.assert_array_equal(many.token_ids, windows)


@pytest.mark.parametrize("batch_tokens", [1, 48])
def test_operands_of_some_samples_only_are_the_same_whatever_the_batches(batch_tokens: int) -> None:
    decoder, windows = Decoder(tiny_family("llama").checkpoint), tokens(rows=6)
    ids = np.array([1, 4, 8, 9, 12, 13])
    every = measure_spikes(decoder, windows, sample_ids=ids)
    some = measure_spikes(decoder, windows, sample_ids=ids, peak_stride=4, batch_tokens=batch_tokens)
    seen = ids % 4 == 0
    assert len(every.operand_amax) == 4
    for name, operands in every.operand_amax.items():
        np.testing.assert_allclose(some.operand_amax[name][seen], operands[seen], rtol=1e-5)
        assert np.isnan(some.operand_amax[name][~seen]).all()
    for name, spikes in every.modules.items():
        outputs = some.modules[name].output_amax
        np.testing.assert_allclose(outputs[seen], spikes.output_amax[seen], rtol=1e-5)
        assert not outputs[~seen].any()
    assert any(spikes.output_amax.any() for spikes in every.modules.values())
    # The guard takes what there is.
    peak = max(operands[seen].max() for operands in every.operand_amax.values())
    loud = replace(some, operand_amax={name: amax * (65504 / peak) for name, amax in some.operand_amax.items()})
    assert stream_dtype("float16", some)[0] == "float16"
    assert stream_dtype("float16", loud)[0] == "bfloat16"


def test_parts_whose_operands_were_not_recorded_merge_with_those_whose_were() -> None:
    decoder, windows = Decoder(tiny_family("llama").checkpoint), tokens(rows=6)
    whole = measure_spikes(decoder, windows, peak_stride=4)
    parts = [
        measure_spikes(decoder, windows[rows], sample_ids=np.arange(6)[rows], peak_stride=4)
        for rows in (slice(0, 2), slice(2, 4), slice(4, 6))
    ]
    merged = merge_statistics(parts)
    assert list(merged.operand_amax) == list(whole.operand_amax)
    for name, operands in whole.operand_amax.items():
        np.testing.assert_array_equal(merged.operand_amax[name], operands)


def test_a_restricted_record_is_part_of_the_whole() -> None:
    decoder, windows = Decoder(tiny_family("llama").checkpoint), tokens()
    module = "model.layers.1.mlp.down_proj"
    whole, only = measure_spikes(decoder, windows), measure_spikes(decoder, windows, modules=(module,), layers=2)
    assert list(only.modules) == [module]
    np.testing.assert_array_equal(only.modules[module].token_amax, whole.modules[module].token_amax)
    np.testing.assert_array_equal(only.modules[module].sample_channel_amax, whole.modules[module].sample_channel_amax)
    assert only.operand_amax == {}
    assert_identical(
        merge_statistics(
            [
                measure_spikes(decoder, windows[rows], modules=(module,), layers=2, sample_ids=np.array(rows))
                for rows in ([1], [0, 2])
            ]
        ),
        only,
    )


@pytest.mark.parametrize("sign", [1, -1])
def test_magnitudes_are_those_of_values_of_either_sign(sign: int) -> None:
    states = sign * torch.tensor([[[3.0, -1], [-9, 2]], [[0, 4], [1, -5]]])
    tokens_of, channels_of = _maxima(states)
    assert tokens_of.tolist() == [[3, 9], [4, 5]]
    assert channels_of.tolist() == [[9, 2], [1, 5]]
    assert _sample_amax(states).tolist() == [9, 5]
    routed = _routed_maxima(states.reshape(4, 2)[[0, 3]], torch.tensor([1, 3]), (2, 2))
    np.testing.assert_array_equal(routed[0], [[np.nan, 3], [np.nan, 5]])
    assert routed[1].tolist() == [[3, 1], [1, 5]]


def test_two_maxima_of_one_input_agree_and_the_prefix_is_not_recorded() -> None:
    windows = tokens()
    found = measure_spikes(Decoder(tiny_family("gemma3_text").checkpoint), windows, PREFIX)
    for spikes in found.modules.values():
        assert spikes.token_amax.shape == windows.shape
        np.testing.assert_array_equal(spikes.token_amax.max(axis=1), spikes.sample_channel_amax.max(axis=1))
    assert found.prefix_ids == PREFIX


@pytest.mark.parametrize("prefix", [(), tuple(range(50, 62))])
def test_operands_are_what_attention_multiplies(prefix: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    windows, length = tokens(length=6), 6
    decoder = Decoder(tiny_family("qwen3").checkpoint)
    seen: list[list[float]] = []
    whole: list[list[float]] = []

    def spy(*operands: Any) -> torch.Tensor:
        if operands[0].shape[2] == length:  # not the prefix on its own way
            seen.append([float(each[:, :, -length:].abs().max()) for each in operands[:3]])
            whole.append([float(each.abs().max()) for each in operands[:3]])
        return attend(*operands)

    monkeypatch.setattr(attention, "attend", spy)
    found = measure_spikes(decoder, windows, prefix)
    expected = np.array(seen, np.float32).reshape(4, len(windows), 3)
    for layer in range(4):
        np.testing.assert_array_equal(found.operand_amax[f"model.layers.{layer}.self_attn"], expected[layer])
    assert (seen != whole) == bool(prefix)  # the prefix has larger ones, which do not count


def damaged(name: str, index: Any, value: float) -> Checkpoint:
    checkpoint = tiny_family("llama").checkpoint
    tensor = checkpoint.tensor(name).copy()
    tensor[index] = value
    return replaced(checkpoint, {name: tensor})


def test_a_nan_is_named_with_its_module_window_and_token() -> None:
    windows = tokens()
    windows[windows == 77] = 5
    windows[1, 13] = 77  # the one place where the damaged embedding is read
    decoder = Decoder(damaged(EMBEDDING, (77, 3), np.nan))
    with pytest.raises(CalibrationError) as caught:
        measure_spikes(decoder, windows, sample_ids=np.array([4, 30, 31]))
    assert str(caught.value).startswith(
        "model.layers.0.self_attn.q_proj: its input is NaN in calibration window 30, token 13; the weights are damaged"
    )
    assert "float32" in str(caught.value)
    # Windows without the token are fine.
    measure_spikes(decoder, windows[[0, 2]])


def test_a_fault_without_a_token_names_the_window_alone() -> None:
    channels, finite = np.array([[1, 2], [np.inf, 1]], np.float32), np.ones((2, 3), np.float32)
    with pytest.raises(CalibrationError, match=r"^m: its input is infinite in calibration window 8; the weights"):
        _require_finite("m", channels, finite, np.array([4, 8]))


@pytest.mark.parametrize("batch_tokens", [1, BATCH_TOKENS])
def test_an_infinity_is_named_where_it_arises(batch_tokens: int) -> None:
    decoder = Decoder(damaged("model.layers.2.mlp.up_proj.weight", (5, 3), np.inf))
    with pytest.raises(
        CalibrationError,
        match=r"^model\.layers\.2\.mlp\.down_proj: its input is infinite in calibration window 0, token 0;",
    ):
        measure_spikes(decoder, tokens(), batch_tokens=batch_tokens)


def test_a_nan_in_one_expert_is_named() -> None:
    checkpoint = tiny_family("mixtral").checkpoint
    name = f"model.layers.1.{MOE}.experts.2.w3.weight"
    weight = checkpoint.tensor(name).copy()
    weight[4, 4] = np.nan
    expected = rf"^model\.layers\.1\.{MOE}\.experts\.2\.w2: its input is NaN in calibration window \d, token \d"
    with pytest.raises(CalibrationError, match=expected):
        measure_spikes(Decoder(replaced(checkpoint, {name: weight})), tokens())


def block_inputs_and_choices(
    model: TinyModel, block: Any, windows: NDArray[np.int64]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    inputs: list[torch.Tensor] = []
    choices: list[torch.Tensor] = []
    handles = [
        block.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0][0])),
        block.gate.register_forward_hook(lambda _, __, output: choices.append(output[2])),
    ]
    with torch.inference_mode():
        for row in windows:
            model.reference(torch.from_numpy(row[None]), use_cache=False)
    for handle in handles:
        handle.remove()
    return inputs, choices


NAMING = {"mixtral": (MOE, ("w1", "w3", "w2")), "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj"))}
"""Family → its block, and an expert's gate, up and down."""


def routed_by_transformers(model: TinyModel, windows: NDArray[np.int64]) -> dict[str, ModuleSpikes]:
    """Return the record of every expert's inputs and outputs, by a loop over tokens.

    The router's choice and the block's input are taken from transformers' own model, window by window.
    """
    found: dict[str, ModuleSpikes] = {}
    config = model.checkpoint.config
    block, (g, u, d) = NAMING[config.family.model_type]
    for layer, decoder_layer in enumerate(model.reference.model.layers):
        inputs, choices = block_inputs_and_choices(model, decoder_layer.mlp, windows)
        for expert in range(config.num_experts):
            stem = f"model.layers.{layer}.{block}.experts.{expert}"
            w1, w2, w3 = (torch.from_numpy(model.checkpoint.tensor(f"{stem}.{name}.weight")) for name in (g, d, u))
            records = {
                name: ModuleSpikes(
                    np.full(windows.shape, np.nan, np.float32),
                    np.zeros((len(windows), width), np.float32),
                    np.zeros(len(windows), np.float32),
                )
                for name, width in ((u, 48), (d, len(w1)))
            }
            for sample, position in np.ndindex(windows.shape):
                if expert in choices[sample][position].tolist():
                    value = inputs[sample][position]
                    gate, up = w1 @ value, w3 @ value
                    product = torch.nn.functional.silu(gate) * up
                    # What gate and up yield is told by their product, down's input: it is not recorded itself.
                    for name, seen, output in ((u, value, torch.zeros(1)), (d, product, w2 @ product)):
                        record, magnitudes = records[name], seen.abs().numpy()
                        record.token_amax[sample, position] = magnitudes.max()
                        channels = record.sample_channel_amax[sample]
                        np.maximum(channels, magnitudes, out=channels)
                        record.output_amax[sample] = max(float(record.output_amax[sample]), float(output.abs().max()))
            found |= {f"{stem}.{name}": record for name, record in records.items()}
    return found


@pytest.mark.parametrize("family", NAMING)
@pytest.mark.parametrize("batch_tokens", [1, BATCH_TOKENS])
def test_an_expert_is_measured_on_the_tokens_it_was_sent(batch_tokens: int, family: str) -> None:
    model, windows = tiny_family(family), tokens(rows=4, length=12)
    config, (block, (_, _, down)) = model.checkpoint.config, NAMING[family]
    routed = routed_by_transformers(model, windows)
    found = measure_spikes(Decoder(model.checkpoint), windows, batch_tokens=batch_tokens)
    assert set(routed) == {name for name in found.modules if ".experts." in name}
    for name, expected in routed.items():
        spikes = found.modules[name]
        np.testing.assert_array_equal(np.isnan(spikes.token_amax), np.isnan(expected.token_amax))
        np.testing.assert_allclose(spikes.token_amax, expected.token_amax, rtol=1e-4)
        np.testing.assert_allclose(spikes.sample_channel_amax, expected.sample_channel_amax, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(spikes.output_amax, expected.output_amax, rtol=1e-4)
    for layer in range(4):
        stem = f"model.layers.{layer}.{block}"
        records = [found.modules[f"{stem}.experts.{expert}.{down}"] for expert in range(config.num_experts)]
        seen = [~np.isnan(record.token_amax) for record in records]
        np.testing.assert_array_equal(np.sum(seen, axis=0), config.experts_per_token)
        assert not np.isnan(found.modules[f"{stem}.gate"].token_amax).any()


def test_what_was_routed_is_the_last_forwards() -> None:
    with torch.inference_mode(), Decoder(tiny_family("mixtral").checkpoint).layer(0) as layer:
        block: Any = layer.get_submodule(MOE)
        states = torch.randn(1, 50, 48, generator=torch.Generator().manual_seed(0))
        block(states)
        before = {expert: positions.tolist() for expert, positions in block.routed.items()}
        assert set(before) == {0, 1, 2, 3}
        block(states[:, 7:8])
        assert block.routed.keys() == {expert for expert, positions in before.items() if 7 in positions}
        assert [positions.tolist() for positions in block.routed.values()] == [[0], [0]]


def test_a_sample_that_an_expert_never_saw_has_no_say_in_it() -> None:
    amax = np.array([[np.nan, np.nan, np.nan], [np.nan, 2, 8], [6, 2, 2]], np.float32)
    spikes = ModuleSpikes(amax, np.zeros((3, 1), np.float32), np.zeros(3, np.float32))
    assert spikes.sample_ratios.tolist() == [4.0, 3.0]
    assert spikes.ratio == 3.5
    assert spikes.sample_amax.tolist() == [0.0, 8.0, 6.0]
    assert (spikes.range("max"), spikes.range("sample-mean")) == (8.0, 7.0)
    assert spikes.sketch.count == 5


def test_an_expert_that_no_token_reaches_is_kept_in_float32() -> None:
    checkpoint = tiny_family("mixtral", num_experts_per_tok=1).checkpoint
    decoder = Decoder(with_unreached_expert(checkpoint, 2))
    found = measure_spikes(decoder, tokens())
    expert = f"model.layers.2.{MOE}.experts.3"
    assert [module for module, spikes in found.modules.items() if not spikes.reached] == [
        f"{expert}.w3",
        f"{expert}.w2",
    ]
    static = CalibrationOptions(activations="static")
    plans = module_plans(found, (), NO_TRANSFORM, static)
    unreached = {f"{expert}.{linear}" for linear in ("w1", "w2", "w3")}
    assert {module for module, plan in plans.items() if plan.reason == UNREACHED} == unreached
    assert {(plans[module].precision, plans[module].weights) for module in unreached} == {("float32", None)}
    recipe = tiny_recipe(decoder.checkpoint, dict.fromkeys(plans, 1.0)).model_copy(update={"modules": plans})
    assert recipe.notes() == (
        "3 linears of experts stay in float32: calibration routed no token to them; give more samples",
    )
    stored = module_plans(found, (), NO_TRANSFORM, replace(static, excluded_weights="int8"))
    assert {(stored[module].precision, stored[module].weights) for module in unreached} == {("float32", "int8")}
    # A token's own scale is made at run time: nothing has to be known beforehand.
    for kind in ("per-token", "auto"):
        dynamic = module_plans(found, (), NO_TRANSFORM, replace(static, activations=kind))
        assert {(dynamic[module].precision, dynamic[module].per_token) for module in unreached} == {("int8", True)}


def test_a_spike_in_one_expert_is_found_with_its_token() -> None:
    """Channel 7 marks one token; in one expert a channel of w2's input is made of that mark alone."""
    token, expert, mark = 77, 2, 7
    checkpoint = tiny_family("mixtral").checkpoint
    moe = f"model.layers.0.{MOE}"
    names = [EMBEDDING, "model.layers.0.self_attn.o_proj.weight", "model.layers.0.post_attention_layernorm.weight"]
    names += [f"{moe}.gate.weight", f"{moe}.experts.{expert}.w1.weight", f"{moe}.experts.{expert}.w3.weight"]
    embedding, output, gain, router, gate, up = tensors = [checkpoint.tensor(name).copy() for name in names]
    embedding[:, mark] = 0
    embedding[token, mark] = 5
    output[mark] = 0  # attention does not write the channel
    gain[mark] = 1
    router[:, mark] = 0
    router[expert, mark] = 10
    gate[5], up[5] = 0, 0
    gate[5, mark], up[5, mark] = 10, 100
    windows = tokens()
    windows[windows == token] = 5
    places = [(0, 17), (1, 3), (2, 20)]
    for place in places:
        windows[place] = token
    planted = Decoder(replaced(checkpoint, dict(zip(names, tensors, strict=True))))
    found = measure_spikes(planted, windows, sample_ids=np.array([2, 6, 7]))
    (first, ratio), (_, second) = list(found.ratios().items())[:2]
    assert first == f"{moe}.experts.{expert}.w2"
    assert ratio > 100 > 10 * second
    top = found.top_tokens(first, 3)
    assert {(each.token_id, each.sample, each.position) for each in top} == {
        (token, [2, 6, 7][sample], position) for sample, position in places
    }
    assert found.modules[first].channel_amax.argmax() == 5
    assert top[0].amax == found.modules[first].amax
    # Must fail: the same without the mark.
    embedding[token, mark] = 0
    plain = measure_spikes(Decoder(replaced(checkpoint, dict(zip(names, tensors, strict=True)))), windows)
    assert plain.modules[first].ratio < 10


def test_every_representative_is_recorded_in_execution_order() -> None:
    for name in ("llama", "phi3", "mixtral"):
        checkpoint = tiny_family(name).checkpoint
        found = measure_spikes(Decoder(checkpoint), tokens())
        assert tuple(found.modules) == representatives(checkpoint.config)
        assert list(found.operand_amax) == [f"model.layers.{layer}.self_attn" for layer in range(4)]


def test_the_outputs_of_layers_are_recorded() -> None:
    decoder, windows = Decoder(tiny_family("llama").checkpoint), tokens()
    found = measure_spikes(decoder, windows, PREFIX)
    for layer in range(4):
        states = decoder.run(windows, PREFIX, layers=layer + 1, batch_tokens=1)
        peaks = [float(states.get(row).abs().max()) for row in range(len(windows))]
        assert found.hidden_amax[:, layer].tolist() == peaks
    assert found.hidden_amax.shape == (len(windows), 4)


def test_parts_without_a_window_whose_operands_are_recorded_merge_too() -> None:
    decoder, windows = Decoder(tiny_family("llama").checkpoint), tokens(rows=6)
    rows = np.arange(6)
    whole = measure_spikes(decoder, windows, sample_ids=rows, peak_stride=4, batch_tokens=1)
    parts = [
        measure_spikes(decoder, windows[part], sample_ids=part, peak_stride=4, batch_tokens=1)
        for part in (rows[:1], rows[1:3], rows[3:])
    ]
    assert_identical(merge_statistics(parts), whole)
    recorded = ~np.isnan(next(iter(whole.operand_amax.values()))).any(axis=1)
    assert recorded.tolist() == [True, False, False, False, True, False]
