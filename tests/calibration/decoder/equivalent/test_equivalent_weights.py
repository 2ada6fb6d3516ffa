"""Rotated and smoothed models compute what the original computes, for every family; a forgotten fold shows."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spike_export.artifacts.errors import RecipeError
from spike_export.artifacts.recipe import HadamardPlan, RotationPlan, SmoothingPlan
from spike_export.calibration.decoder.equivalent import equivalent_weights
from spike_export.calibration.decoder.equivalent.equivalent_weights import (
    EquivalentTensors,
    equivalent_checkpoint,
    rotation_obstacle,
)
from spike_export.calibration.decoder.equivalent.hadamard import (
    hadamard_plan,
    transform_channels,
    transform_columns,
    transform_rows,
    value_block,
)
from spike_export.calibration.decoder.equivalent.rotation import rotation_plan
from spike_export.calibration.decoder.equivalent.smoothing import plan_scales, smoothing_plan
from spike_export.calibration.decoder.layerwise import Decoder, Execution
from spike_export.calibration.statistics.measure import measure_spikes
from spike_export.checkpoint import row_blocks
from spike_export.checkpoint.checkpoint import EMBEDDING, LM_HEAD, Checkpoint
from spike_export.checkpoint.decoder_config import tensor_shapes
from spike_export.checkpoint.hf_directory import SafetensorsSource
from spike_export.checkpoint.modules import block_inputs, input_sites
from spike_export.checkpoint.opening import open_checkpoint
from tests.support.tiny.checkpoints import random_llama, write_hf
from tests.support.tiny.families import NAMES, replaced, tiny_family, tokens
from tests.support.tiny.models import MemoryTensors

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 1e-5
"""Of logits, relative to the largest: float32 rounding of four layers is about 2e-6."""

ROTATABLE = tuple(name for name in NAMES if name not in ("gemma2", "gemma3_text", "olmo2"))
ROTATION = rotation_plan(48, 3)
HADAMARD = HadamardPlan(block=8)


def logits(checkpoint: Checkpoint, prefix: tuple[int, ...] = ()) -> torch.Tensor:
    decoder = Decoder(checkpoint)
    states = decoder.run(tokens(), prefix)
    return torch.cat([decoder.head().logits(states.get(index)) for index in range(len(states))])


def change(checkpoint: Checkpoint, original: torch.Tensor, prefix: tuple[int, ...] = ()) -> float:
    return float((logits(checkpoint, prefix) - original).abs().max() / original.abs().max())


def widths(checkpoint: Checkpoint) -> dict[str, int]:
    """Return the number of scales of each input, by a rule of thumb of this size: hidden 48, MLP 80, values 2 heads."""
    config = checkpoint.config
    special = {"o_proj": 2 * config.head_dim, "down_proj": config.expert_size or 80, "w2": 80}
    return {
        site.representative: special.get(site.representative.rpartition(".")[2], 48) for site in input_sites(config)
    }


def random_smoothing(checkpoint: Checkpoint, seed: int = 0) -> dict[str, SmoothingPlan]:
    """Scale every input of every layer that can be scaled: one entry per producer."""
    random = np.random.default_rng(seed)
    sites = [site for site in reversed(input_sites(checkpoint.config)) if site.producer is not None]
    producers = {site.producer: site.representative for site in sites}
    sizes = widths(checkpoint)
    return {
        f"model.layers.{layer}.{name}": smoothing_plan(
            "smoothquant", 0.5, np.exp(random.normal(size=sizes[name])).astype(np.float32)
        )
        for layer in range(checkpoint.config.num_hidden_layers)
        for name in producers.values()
    }


def value_blocks(checkpoint: Checkpoint) -> dict[str, int]:
    """Rotate the value heads of all layers but the first."""
    block = value_block(checkpoint.config)
    assert block is not None
    layers = range(1, checkpoint.config.num_hidden_layers)
    return {f"model.layers.{layer}.self_attn.o_proj": block for layer in layers}


def input_blocks(checkpoint: Checkpoint) -> dict[str, int]:
    """Transform attention's input in all layers but the first, and the feed-forward block's in the first."""
    attention, feed_forward = block_inputs(checkpoint.config)
    found = {f"model.layers.{layer}.{attention}": 16 for layer in range(1, checkpoint.config.num_hidden_layers)}
    return found if feed_forward is None else {f"model.layers.0.{feed_forward}": 8, **found}


def test_which_families_can_be_rotated() -> None:
    configs = {name: tiny_family(name).checkpoint.config for name in NAMES}
    assert tuple(name for name, config in configs.items() if rotation_obstacle(config) is None) == ROTATABLE


@pytest.mark.parametrize("name", NAMES)
def test_smoothing_leaves_the_logits(name: str) -> None:
    original = tiny_family(name).checkpoint
    smoothed = equivalent_checkpoint(original, None, random_smoothing(original))
    expected = logits(original)
    assert change(smoothed, expected) < TOLERANCE
    assert smoothed.config == original.config
    assert smoothed.tensors.sha256() == original.tensors.sha256()
    assert smoothed.tensors.shapes == original.tensors.shapes


@pytest.mark.parametrize(
    ("rotation", "hadamard", "values"),
    [(None, None, False), (ROTATION, None, False), (None, HADAMARD, False), (None, HADAMARD, True)],
    ids=["smoothed", "rotated", "smoothed and transformed", "with rotated values and transformed inputs"],
)
@pytest.mark.parametrize("name", NAMES)
def test_rows_are_those_of_the_whole_tensor(
    name: str,
    rotation: RotationPlan | None,
    hadamard: HadamardPlan | None,
    values: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if rotation is not None and name not in ROTATABLE:
        pytest.skip("cannot be rotated")
    original = tiny_family(name).checkpoint
    rotated, inputs = (value_blocks(original), input_blocks(original)) if values else ({}, {})
    changed = equivalent_checkpoint(original, rotation, random_smoothing(original), hadamard, rotated, inputs)
    # Rows of 48 and more channels come in fives, so that blocks lie before, in and across a fused projection's rows.
    monkeypatch.setattr(row_blocks, "_BLOCK_ELEMENTS", 5 * 48)
    scaled = 0
    for tensor, shape in tensor_shapes(changed.config).items():
        expected = changed.tensor(tensor)
        scaled += not np.array_equal(expected, original.tensor(tensor))
        for dtype in (np.float32, np.float16) if len(shape) == 2 else ():
            out = np.full(shape, np.nan, dtype)
            with changed.block_reader(tensor) as read:
                row_blocks.fill_by_rows(out, read)
            np.testing.assert_array_equal(out, expected.astype(dtype), err_msg=tensor)
    assert scaled > original.config.num_hidden_layers


def test_a_smoothed_matrix_is_never_read_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    original = open_checkpoint(str(write_hf(tmp_path, random_llama(hidden_size=48, intermediate_size=80, head_dim=12))))
    smoothed = equivalent_checkpoint(original, None, random_smoothing(original))
    name = "model.layers.1.mlp.up_proj.weight"
    expected, out = smoothed.tensor(name), np.empty(original.stored_shape(name), np.float32)
    assert not np.array_equal(expected, original.tensor(name))
    monkeypatch.setattr(SafetensorsSource, "read", None)
    with smoothed.block_reader(name) as read:
        row_blocks.fill_by_rows(out, read)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_hadamard_transform_leaves_the_logits(name: str) -> None:
    original = tiny_family(name).checkpoint
    rotation = ROTATION if name in ROTATABLE else None
    changed = equivalent_checkpoint(original, rotation, random_smoothing(original), HADAMARD)
    expected = logits(original, (1, 7))
    assert change(changed, expected, (1, 7)) < TOLERANCE
    # The transform in front of down_proj is a part of it.
    without = replace(changed, config=replace(changed.config, hadamard_block=None))
    assert change(without, expected, (1, 7)) > 0.01


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_transformed_inputs_of_blocks_leave_the_logits(name: str, smooth: bool) -> None:
    """Beside all other transforms too; each of the transforms at run time is a part of it."""
    original = tiny_family(name).checkpoint
    rotation = ROTATION if name in ROTATABLE and smooth else None
    smoothing, values = (random_smoothing(original), value_blocks(original)) if smooth else ({}, {})
    inputs, hadamard = input_blocks(original), HADAMARD if smooth else None
    changed = equivalent_checkpoint(original, rotation, smoothing, hadamard, values, inputs)
    expected = logits(original, (1, 7))
    # All transforms together round each weight, and each input, as often again.
    assert change(changed, expected, (1, 7)) < (2 if smooth else 1) * TOLERANCE
    for left_out in inputs:
        others = {each: block for each, block in inputs.items() if each != left_out}
        without = replace(changed, config=replace(changed.config, input_hadamard=others))
        assert change(without, expected, (1, 7)) > 0.01


@pytest.mark.parametrize(
    ("name", "module", "block", "message"),
    [
        ("llama", "self_attn.q_proj", 32, "block 32 does not divide the 48 channels of the residual stream; give "),
        ("llama", "mlp.down_proj", 8, "no block of this decoder reads such an input; remove the entry"),
        ("mixtral", "block_sparse_moe.experts.0.w3", 8, "no block of this decoder reads such an input; remove"),
    ],
)
def test_input_blocks_that_do_not_fit_are_refused(name: str, module: str, block: int, message: str) -> None:
    named = f"model.layers.1.{module}"
    with pytest.raises(RecipeError, match=rf"^input_hadamard of {re.escape(named)}: {message}"):
        equivalent_checkpoint(tiny_family(name).checkpoint, None, {}, None, {}, {named: block})


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_rotated_value_heads_leave_the_logits(name: str, smooth: bool) -> None:
    original = tiny_family(name).checkpoint
    rotation = ROTATION if name in ROTATABLE and smooth else None
    smoothing = random_smoothing(original) if smooth else {}
    changed = equivalent_checkpoint(original, rotation, smoothing, None, value_blocks(original))
    assert change(changed, logits(original, (1, 7)), (1, 7)) < TOLERANCE
    output = "model.layers.{}.self_attn.o_proj.weight"
    same = [
        np.array_equal(changed.tensor(output.format(layer)), original.tensor(output.format(layer))) for layer in (0, 1)
    ]
    assert same == [not smooth, False]


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3"])
def test_a_value_channel_is_spread_over_its_head(name: str) -> None:
    """By the root of the block's size, in a projection of its own and in a fused one; its other rows stay."""
    original = tiny_family(name).checkpoint
    blocks, wide = value_blocks(original), original.config.num_key_value_heads * original.config.head_dim
    size = blocks["model.layers.1.self_attn.o_proj"]
    producer = "model.layers.1.self_attn." + ("qkv_proj" if name == "phi3" else "v_proj")
    larger = original.tensor(f"{producer}.weight").copy()
    larger[-wide + 3] *= 1e6
    spiked = replaced(original, {f"{producer}.weight": larger})
    changed = equivalent_checkpoint(spiked, None, {}, None, blocks)
    before, after = (np.abs(each.tensor(f"{producer}.weight")[-wide:]).max(axis=1) for each in (spiked, changed))
    assert before[3] > 100 * np.median(before[:size])
    np.testing.assert_allclose(after[:size], before[3] / size**0.5, rtol=1e-3)
    np.testing.assert_array_equal(
        changed.tensor(f"{producer}.weight")[:-wide], spiked.tensor(f"{producer}.weight")[:-wide]
    )


@pytest.mark.parametrize(
    ("name", "block", "message"),
    [
        ("self_attn.o_proj", 32, r"block 32 does not divide the 16 channels of a head; give another power of two"),
        ("mlp.down_proj", 8, "no o_proj of this decoder has that name; remove the entry"),
    ],
)
def test_value_blocks_that_do_not_fit_are_refused(name: str, block: int, message: str) -> None:
    module = f"model.layers.1.{name}"
    with pytest.raises(RecipeError, match=rf"^value_rotation of {module}: {message}"):
        equivalent_checkpoint(tiny_family("llama").checkpoint, None, {}, None, {module: block})


def test_the_transform_spreads_a_channel_over_its_block() -> None:
    """A spike's magnitude falls by the square root of the block's size."""
    original = tiny_family("llama").checkpoint
    changed = equivalent_checkpoint(original, None, {}, HADAMARD)
    spike = torch.zeros(80)
    spike[21] = 800.0
    found = transform_channels(spike, 8)
    assert torch.count_nonzero(found) == 8
    np.testing.assert_allclose(found[16:24].abs().numpy(), 800 / 8**0.5, rtol=1e-6)
    name = "model.layers.0.mlp.down_proj.weight"
    expected = original.tensor(name) @ spike.numpy()
    np.testing.assert_allclose(changed.tensor(name) @ found.numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [2, 16, 64])
def test_weights_and_activations_are_transformed_by_one_matrix(block: int) -> None:
    """By additions in a fixed order, and as a product."""
    values = np.random.default_rng(0).standard_normal((5, 128)).astype(np.float32)
    matrix = np.array([[(-1.0) ** bin(row & column).count("1") for column in range(block)] for row in range(block)])
    expected = (values.reshape(-1, block).astype(np.float64) @ matrix / block**0.5).reshape(5, 128)
    columns, rows = values.copy(), values.T.copy()
    transform_columns(columns, block)
    transform_rows(rows, block)
    for found in (columns, rows.T, transform_channels(torch.from_numpy(values), block).numpy()):
        np.testing.assert_allclose(found, expected, atol=64 * 2**-24 * 4)  # as many roundings of values up to 4


@pytest.mark.parametrize("channels", [1536, 2048, 5632, 11008, 14336, 80, 6, 1])
def test_blocks_are_as_large_as_the_channels_allow(channels: int) -> None:
    plan = hadamard_plan(channels)
    fitting = [block for block in (2, 4, 8, 16, 32, 64) if channels % block == 0]
    assert (plan and plan.block) == (max(fitting) if fitting else None)


def test_blocks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RecipeError, match="hadamard: block 32 does not divide the 80 channels that down_proj reads; "):
        equivalent_checkpoint(tiny_family("llama").checkpoint, None, {}, HadamardPlan(block=32))


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("plan", [ROTATION, RotationPlan(kind="orthogonal", seed=1)])
@pytest.mark.parametrize("name", ROTATABLE)
def test_rotation_leaves_the_logits(name: str, plan: RotationPlan, smooth: bool) -> None:
    original = tiny_family(name).checkpoint
    rotated = equivalent_checkpoint(original, plan, random_smoothing(original) if smooth else {})
    assert change(rotated, logits(original)) < TOLERANCE
    assert change(rotated, logits(original, (1, 7)), (1, 7)) < TOLERANCE
    # It is another model inside.
    name = "model.layers.2.self_attn.o_proj.weight"
    assert np.abs(rotated.tensor(name) - original.tensor(name)).max() > 0.1


@pytest.mark.parametrize("stored", [EMBEDDING, LM_HEAD])
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_a_tied_head_is_untied_by_rotation_only(name: str, stored: str) -> None:
    original = tiny_family(name, tie_word_embeddings=True).checkpoint
    tensors: Any = original.tensors
    held = {key: value for key, value in tensors.tensors.items() if key != EMBEDDING}
    original = replace(original, tensors=MemoryTensors({**held, stored: original.tensor(EMBEDDING)}))
    expected, smoothing = logits(original), random_smoothing(original)
    for rotation in (None, ROTATION):
        changed = equivalent_checkpoint(original, rotation, smoothing)
        assert change(changed, expected) < TOLERANCE
        assert changed.config.tie_word_embeddings == changed.config.hf["tie_word_embeddings"] == (rotation is None)
        if rotation:
            assert changed.tensors.shapes.keys() == tensor_shapes(changed.config).keys()
            assert not np.array_equal(changed.tensor(EMBEDDING), changed.tensor(LM_HEAD))


def test_biases_are_folded() -> None:
    original = tiny_family("llama", attention_bias=True, mlp_bias=True).checkpoint
    smoothing, expected = random_smoothing(original), logits(original)
    for rotation in (None, ROTATION):
        assert change(equivalent_checkpoint(original, rotation, smoothing), expected) < TOLERANCE


def test_a_streamed_model_folds_anew_and_alike() -> None:
    original = tiny_family("mixtral").checkpoint
    changed = equivalent_checkpoint(original, ROTATION, random_smoothing(original))
    resident = Decoder(changed).run(tokens()).get(0)
    streamed = Decoder(changed, Execution(resident=False))
    assert torch.equal(streamed.run(tokens()).get(0), resident)
    assert torch.equal(streamed.run(tokens()).get(0), resident)


def test_nothing_to_do_is_the_checkpoint_itself() -> None:
    original = tiny_family("llama").checkpoint
    assert equivalent_checkpoint(original, None, {}) is original


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored_does_not_change(name: str) -> None:
    original = tiny_family(name).checkpoint
    stored: Any = original.tensors
    before = {key: value.copy() for key, value in stored.tensors.items()}
    logits(equivalent_checkpoint(original, None if rotation_obstacle(original.config) else ROTATION, {}))
    logits(equivalent_checkpoint(original, None, random_smoothing(original)))
    for key, value in before.items():
        np.testing.assert_array_equal(stored.tensors[key], value)


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_divided_by_the_scales(name: str) -> None:
    original = tiny_family(name).checkpoint
    smoothing = random_smoothing(original)
    before = measure_spikes(Decoder(original), tokens())
    after = measure_spikes(Decoder(equivalent_checkpoint(original, None, smoothing)), tokens())
    for module, plan in smoothing.items():
        scales = plan_scales(plan)
        if module.endswith("o_proj"):
            size = original.config.head_dim
            scales = np.concatenate([scales[head // 2 * size : (head // 2 + 1) * size] for head in range(4)])
        seen, expected = after.modules[module], before.modules[module].sample_channel_amax / scales
        largest = expected.max(axis=0)
        assert np.abs(seen.sample_channel_amax - expected).max() < 1e-4 * largest.max()
        assert before.modules[module].smoothed_range(scales, "max") == pytest.approx(seen.range("max"), rel=1e-4)
        assert before.modules[module].smoothed_range(scales, "sample-mean") == pytest.approx(
            seen.range("sample-mean"), rel=1e-4
        )


Fault = Callable[[pytest.MonkeyPatch], None]


def no_norm_division(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(EquivalentTensors, "_norm", lambda self, layer, norm, tensor: tensor)


def no_columns(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(EquivalentTensors, "_column_scales", lambda self, layer, site: None)


def no_rows(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(EquivalentTensors, "_producers", {})


def wrong_group(patch: pytest.MonkeyPatch) -> None:
    def tiled(channels: Any, config: Any) -> Any:
        return np.tile(channels, config.num_attention_heads // config.num_key_value_heads)

    patch.setattr(equivalent_weights, "repeated_for_group", tiled)


def no_norm_offset(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(EquivalentTensors, "_offset", 0.0)


def no_writer(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(equivalent_weights, "_writes_stream", lambda module: False)


def no_expert_writer(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(equivalent_weights, "_writes_stream", lambda module: module in ("self_attn.o_proj", "mlp.down_proj"))


def no_head(patch: pytest.MonkeyPatch) -> None:
    outer = EquivalentTensors._outer

    def skipped(self: EquivalentTensors, name: str, tensor: Any) -> Any:
        return tensor if name == LM_HEAD else outer(self, name, tensor)

    patch.setattr(EquivalentTensors, "_outer", skipped)


def no_embedding(patch: pytest.MonkeyPatch) -> None:
    outer = EquivalentTensors._outer

    def skipped(self: EquivalentTensors, name: str, tensor: Any) -> Any:
        return tensor if name == EMBEDDING else outer(self, name, tensor)

    patch.setattr(EquivalentTensors, "_outer", skipped)


def no_biases(patch: pytest.MonkeyPatch) -> None:
    linear = EquivalentTensors._linear

    def skipped(self: EquivalentTensors, layer: int, module: str, kind: str, tensor: Any) -> Any:
        return tensor if kind == "bias" else linear(self, layer, module, kind, tensor)

    patch.setattr(EquivalentTensors, "_linear", skipped)


@pytest.mark.parametrize(
    ("fault", "name", "rotation"),
    [
        (no_norm_division, "llama", None),
        (no_norm_division, "llama", ROTATION),
        (no_columns, "llama", None),
        (no_columns, "mixtral", ROTATION),
        (no_rows, "llama", None),
        (no_rows, "phi3", None),
        (no_rows, "mixtral", None),
        (wrong_group, "llama", None),
        (no_norm_offset, "gemma", None),
        (no_norm_offset, "gemma", ROTATION),
        (no_norm_offset, "gemma3_text", None),
        (no_writer, "llama", ROTATION),
        (no_expert_writer, "mixtral", ROTATION),
        (no_expert_writer, "qwen3_moe", ROTATION),
        (no_head, "llama", ROTATION),
        (no_embedding, "llama", ROTATION),
        (no_biases, "qwen2", None),
    ],
)
def test_a_forgotten_fold_shows(
    fault: Fault, name: str, rotation: RotationPlan | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = tiny_family(name).checkpoint
    expected, smoothing = logits(original), random_smoothing(original)
    fault(monkeypatch)
    assert change(equivalent_checkpoint(original, rotation, smoothing), expected) > 1000 * TOLERANCE


ONES = smoothing_plan("smoothquant", 0.5, np.ones(48, np.float32))


@pytest.mark.parametrize(
    ("smoothing", "message"),
    [
        (
            {"model.layers.0.mlp.gate_proj": ONES},
            "smoothing of model.layers.0.mlp.gate_proj: no input of this decoder has that name; remove the entry",
        ),
        (
            {"model.layers.4.mlp.up_proj": ONES},
            "smoothing of model.layers.4.mlp.up_proj: no input of this decoder has that name; remove the entry",
        ),
        ({"lm_head": ONES}, "smoothing of lm_head: 'lm_head' is not the name of a decoder layer's module"),
        (
            {"model.layers.1.mlp.down_proj": ONES},
            "smoothing of model.layers.1.mlp.down_proj: 48 scales for 80 channels; calibrate again",
        ),
        (
            {"model.layers.1.self_attn.o_proj": ONES},
            "smoothing of model.layers.1.self_attn.o_proj: 48 scales for 32 channels; calibrate again",
        ),
        (
            {"model.layers.0.mlp.up_proj": ONES.model_copy(update={"exponents": "!"})},
            "smoothing of model.layers.0.mlp.up_proj: ",
        ),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(smoothing: Mapping[str, SmoothingPlan], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        equivalent_checkpoint(tiny_family("llama").checkpoint, None, smoothing)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_scales_of_one_norm_may_be_given_twice_but_not_differ() -> None:
    original = tiny_family("mixtral").checkpoint
    moe = "model.layers.1.block_sparse_moe"
    scales = smoothing_plan("smoothquant", 0.5, np.linspace(0.5, 2, 48, dtype=np.float32))
    same = {f"{moe}.gate": scales, f"{moe}.experts.3.w3": scales}
    assert change(equivalent_checkpoint(original, None, same), logits(original)) < TOLERANCE
    with pytest.raises(RecipeError, match=rf"smoothing of {moe}\.experts\.3\.w3: {moe}\.gate reads the same tensor"):
        equivalent_checkpoint(original, None, {**same, f"{moe}.experts.3.w3": ONES})


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "olmo2"])
def test_a_family_that_cannot_be_rotated_is_refused(name: str) -> None:
    with pytest.raises(
        RecipeError, match=rf"^rotation: {name} cannot be rotated: norms behind attention .*; remove it"
    ):
        equivalent_checkpoint(tiny_family(name).checkpoint, ROTATION, {})


@pytest.mark.parametrize("module", ["self_attn.q_proj", "mlp.up_proj"])
def test_an_input_that_no_norm_makes_is_not_smoothed(module: str) -> None:
    plan = smoothing_plan("smoothquant", 0.5, np.full(48, 2.0, np.float32))
    with pytest.raises(RecipeError, match=rf"^smoothing of model\.layers\.1\.{module}: no norm can absorb the scales"):
        equivalent_checkpoint(tiny_family("olmo2").checkpoint, None, {f"model.layers.1.{module}": plan})


def test_a_hadamard_rotation_of_an_unknown_width_is_refused() -> None:
    checkpoint = tiny_family("llama", hidden_size=52).checkpoint
    assert rotation_plan(52, 0).kind == "orthogonal"
    with pytest.raises(RecipeError, match=r"no Hadamard matrix of order 52 .*; use kind orthogonal"):
        equivalent_checkpoint(checkpoint, RotationPlan(kind="hadamard", seed=0), {})
    assert change(equivalent_checkpoint(checkpoint, rotation_plan(52, 0), {}), logits(checkpoint)) < TOLERANCE
