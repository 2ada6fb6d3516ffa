"""Smoothing scales against the papers' formulas written out, their storage, and the grouping of query heads."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from spike_export.calibration.decoder.equivalent.smoothing import (
    is_per_value_head,
    plan_scales,
    repeated_for_group,
    shared_by_group,
    smoothing_plan,
    smoothing_scales,
)
from spike_export.checkpoint.modules import input_sites
from tests.support.tiny.families import NAMES, tiny_family

Floats = NDArray[np.float32]

magnitudes = arrays(np.float32, 12, elements=st.floats(2.0**-10, 2.0**15, width=32))


@settings(deadline=None)
@given(magnitudes, magnitudes, st.floats(0, 1))
def test_smoothquant_by_its_formula(inputs: Floats, weights: Floats, strength: float) -> None:
    # arXiv 2211.10438, equation 4: s_j = max|X_j|^a / max|W_j|^(1 - a).
    expected = [float(a) ** strength / float(w) ** (1 - strength) for a, w in zip(inputs, weights, strict=True)]
    np.testing.assert_allclose(smoothing_scales("smoothquant", strength, inputs, weights), expected, rtol=1e-5)


@settings(deadline=None)
@given(magnitudes, magnitudes, st.floats(0.01, 1))
def test_outlier_suppression_by_its_formula(inputs: Floats, weights: Floats, share: float) -> None:
    # arXiv 2304.09145: s_j = max(1, max|X_j| / t), so that no channel exceeds t; the weights have no say.
    threshold = share * max(float(a) for a in inputs)
    expected = [max(1.0, float(a) / threshold) for a in inputs]
    scales = smoothing_scales("outlier-suppression", share, inputs, weights)
    np.testing.assert_allclose(scales, expected, rtol=1e-5)
    assert (inputs / scales).max() <= threshold * (1 + 1e-5)


def test_half_strength_makes_input_and_weight_alike() -> None:
    inputs, weights = np.array([100, 4], np.float32), np.array([1, 0.25], np.float32)
    scales = smoothing_scales("smoothquant", 0.5, inputs, weights)
    np.testing.assert_allclose(scales, [10, 4], rtol=1e-6)
    np.testing.assert_allclose(inputs / scales, weights * scales, rtol=1e-6)


@pytest.mark.parametrize("form", ["smoothquant", "smoothquant-typical", "outlier-suppression"])
def test_dead_channels_have_a_finite_scale(form: str) -> None:
    inputs, weights = np.array([0, 1, 0], np.float32), np.array([0, 0, 1], np.float32)
    scales = smoothing_scales(form, 0.5, inputs, weights)  # type: ignore[arg-type]
    assert np.isfinite(scales).all()
    assert (scales > 0).all()


@settings(deadline=None)
@given(arrays(np.float32, st.integers(1, 20), elements=st.floats(2.0**-14, 2.0**14, width=32)))
def test_a_plan_holds_each_scale_to_a_sixteenth_octave(scales: Floats) -> None:
    plan = smoothing_plan("smoothquant", 0.5, scales)
    stored = plan_scales(plan)
    assert stored.shape == scales.shape
    assert np.abs(np.log2(stored.astype(np.float64) / scales)).max() <= 1 / 16 + 1e-6
    assert smoothing_plan("smoothquant", 0.5, stored) == plan  # stored once, it is stored exactly


def test_stored_scales_by_hand() -> None:
    plan = smoothing_plan("smoothquant", 0.5, np.array([1, 2, 0.5, 3, 1e30, 1e-30], np.float32))
    # log2(3) = 1.585: 12.68 eighths round to 13. The last two are clipped to what 15 octaves hold.
    assert plan_scales(plan).tolist() == [1.0, 2.0, 0.5, np.float32(2 ** (13 / 8)), 2.0**15, 2.0**-15]
    assert plan.exponents == "AAj4DXiI"


def test_a_damaged_plan_is_refused() -> None:
    plan = smoothing_plan("smoothquant", 0.5, np.ones(4, np.float32))
    with pytest.raises(ValueError, match=r"."):
        plan_scales(plan.model_copy(update={"exponents": plan.exponents[:-1] + "!"}))


@pytest.mark.parametrize(("heads", "key_value"), [(4, 2), (4, 1), (4, 4), (6, 2)])
def test_query_heads_share_the_scales_of_their_value_head(heads: int, key_value: int) -> None:
    size = 3
    config = replace(
        tiny_family("llama").checkpoint.config, num_attention_heads=heads, num_key_value_heads=key_value, head_dim=size
    )
    channels = np.random.default_rng(0).permutation(heads * size).astype(np.float32)
    shared = shared_by_group(channels, config)
    repeated = repeated_for_group(shared, config)
    assert (shared.shape, repeated.shape) == ((key_value * size,), (heads * size,))
    # transformers repeats value head v for query heads v * groups to (v + 1) * groups - 1.
    readers: dict[int, list[int]] = {head: [] for head in range(key_value)}
    for head in range(heads):
        readers[math.floor(head * key_value / heads)].append(head)
    for value_head, group in readers.items():
        for channel in range(size):
            own = shared[value_head * size + channel]
            assert own == max(channels[head * size + channel] for head in group)
            assert all(repeated[head * size + channel] == own for head in group)


@pytest.mark.parametrize("name", NAMES)
def test_one_input_of_a_layer_is_attentions_output(name: str) -> None:
    sites = input_sites(tiny_family(name).checkpoint.config)
    assert [site.representative for site in sites if is_per_value_head(site)] == ["self_attn.o_proj"]
