"""Properties of weight quantization."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from spike_export.artifacts.recipe import WeightScheme
from spike_export.calibration.decoder.weight_quantization import quantize_weight

weights = arrays(
    np.float32,
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
)
schemes = st.sampled_from(["int8-per-channel", "int8-per-tensor"])


@given(weights, schemes)
def test_error_is_at_most_half_a_step(weight: NDArray[np.float32], scheme: WeightScheme) -> None:
    quantized, scale = quantize_weight(weight, scheme)
    restored = quantized.T.astype(np.float64) * scale.astype(np.float64).reshape(-1, 1)
    step = np.broadcast_to(scale.reshape(-1, 1), weight.shape).astype(np.float64)
    # A few float32 roundings of w / s, at most 127, come on top of the half.
    assert (np.abs(restored - weight) <= step * (0.5 + 127 * 2.0**-22)).all()


@given(weights, schemes)
def test_shapes_types_and_range(weight: NDArray[np.float32], scheme: WeightScheme) -> None:
    quantized, scale = quantize_weight(weight, scheme)
    assert quantized.shape == weight.shape[::-1]
    assert quantized.dtype == np.int8
    assert quantized.flags.c_contiguous
    assert quantized.min() >= -127
    assert scale.dtype == np.float32
    assert scale.shape == ((weight.shape[0],) if scheme == "int8-per-channel" else ())
    assert (scale > 0).all()


@given(weights, schemes)
def test_negation_negates(weight: NDArray[np.float32], scheme: WeightScheme) -> None:
    quantized, scale = quantize_weight(weight, scheme)
    negated, same = quantize_weight(-weight, scheme)
    np.testing.assert_array_equal(negated, -quantized)
    np.testing.assert_array_equal(scale, same)


@pytest.mark.parametrize("scheme", ["int8-per-channel", "int8-per-tensor"])
@pytest.mark.parametrize("shape", [(37, 11), (64, 512), (577, 1030)], ids=str)
def test_blocks_change_nothing(shape: tuple[int, int], scheme: WeightScheme) -> None:
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    quantized, scale = quantize_weight(weight, scheme)
    amax = np.abs(weight).max(axis=1 if scheme == "int8-per-channel" else None)
    np.testing.assert_array_equal(scale, amax / np.float32(127))
    expected = np.clip(np.rint(weight / scale.reshape(-1, 1)), -127, 127)
    np.testing.assert_array_equal(quantized, expected.T)


@given(
    arrays(
        np.float32, st.tuples(st.integers(1, 4), st.integers(1, 3)), elements=st.floats(-(2.0**100), 2.0**100, width=32)
    )
)
def test_the_largest_weight_is_127_steps(weight: NDArray[np.float32]) -> None:
    """Nothing is clipped, so that the roundings must not reach 128."""
    quantized, _ = quantize_weight(weight, "int8-per-channel")
    large = np.abs(weight).max(axis=1) > 1e-12
    assert (np.abs(quantized).max(axis=0)[large] == 127).all()


def test_halves_round_to_even() -> None:
    quantized, scale = quantize_weight(np.array([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]], np.float32), "int8-per-channel")
    assert scale.tolist() == [1.0]
    assert quantized[:, 0].tolist() == [127, 0, 2, 2, 0, -2]


def test_zero_channel_has_a_positive_scale() -> None:
    quantized, scale = quantize_weight(np.array([[0.0, 0.0], [1.0, -2.0]], np.float32), "int8-per-channel")
    assert scale[0] > 0
    assert quantized[:, 0].tolist() == [0, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_weight_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_weight(np.array([[1.0, bad]], np.float32), "int8-per-tensor")
