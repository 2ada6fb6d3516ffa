"""Rotations are orthogonal, of even entries where a Hadamard matrix is known, and the same everywhere."""

import hashlib

import numpy as np
import pytest

from spike_export.artifacts.recipe import RotationPlan
from spike_export.calibration.decoder.equivalent.rotation import rotation_matrix, rotation_plan

WIDTHS = (48, 64, 576, 640, 896, 1152, 1536, 2048, 2304, 3072, 3584, 4096, 5120, 8192)
"""Hidden sizes of the families' models, and a test's."""

UNKNOWN = (52, 92, 100, 116, 156, 172, 184, 188)
"""Multiples of 4 below 200 of which these constructions yield no Hadamard matrix."""

PROBES = 16
"""A matrix that is not orthogonal passes all of these with a chance of 2^-16 (Freivalds)."""


# The largest is 4096 doubled, and takes as long as all others together.
@pytest.mark.parametrize("width", [*WIDTHS[:-1], pytest.param(WIDTHS[-1], marks=pytest.mark.slow)])
def test_a_models_width_has_a_hadamard_rotation(width: int) -> None:
    plan = rotation_plan(width, 1)
    assert plan == RotationPlan(kind="hadamard", seed=1)
    matrix = rotation_matrix(plan, width)
    assert matrix.shape == (width, width)
    # Whole numbers, whose products are exact; by blocks of rows, because the largest matrix takes half a gigabyte.
    probes = np.random.default_rng(0).integers(0, 2, (width, PROBES)).astype(np.float64)
    back = np.zeros_like(probes)
    for rows in np.split(matrix, range(256, width, 256)):
        signs = np.sign(rows)
        np.testing.assert_allclose(rows * np.sqrt(width), signs, rtol=1e-15)
        assert (signs != 0).all()
        back += signs.T @ (signs @ probes)
    np.testing.assert_array_equal(back, width * probes)


def test_every_width_has_a_rotation() -> None:
    unknown = []
    for width in [*range(1, 12), *range(12, 200, 4)]:
        plan = rotation_plan(width, 5)
        matrix = rotation_matrix(plan, width)
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(width), rtol=0, atol=1e-12)
        if plan.kind == "hadamard":
            np.testing.assert_allclose(np.abs(matrix), 1 / np.sqrt(width), rtol=1e-15)
        else:
            unknown.append(width)
    assert unknown == [3, 5, 6, 7, 9, 10, 11, *UNKNOWN]


def test_a_hadamard_rotation_keeps_its_bits() -> None:
    # Recipes hold the seed only: a change here breaks those that were written.
    matrix = rotation_matrix(RotationPlan(kind="hadamard", seed=7), 48)
    signs = np.packbits(matrix > 0)
    assert (
        hashlib.sha256(signs.tobytes()).hexdigest()
        == "29a172e93529bf58d46cfee3e08d79fb2e6b4a75254a9077f0b9a4105e70a5d3"
    )


def test_an_orthogonal_rotation_keeps_its_values() -> None:
    matrix = rotation_matrix(RotationPlan(kind="orthogonal", seed=7), 6)
    # LAPACK rounds in an order of its own.
    np.testing.assert_allclose(
        matrix[0],
        [
            0.0005024062770744298,
            0.1710691571394048,
            -0.10785567028399208,
            -0.8124097949451146,
            -0.5460129843571072,
            -0.031022434492147158,
        ],
        rtol=1e-9,
    )


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
def test_the_seed_decides(kind: str) -> None:
    def matrix(seed: int) -> np.ndarray:
        return rotation_matrix(RotationPlan.model_validate({"kind": kind, "seed": seed}), 64)

    np.testing.assert_array_equal(matrix(3), matrix(3))
    assert (matrix(3) != matrix(4)).mean() > 0.3


def test_a_spike_in_one_channel_is_spread_over_all() -> None:
    stream = np.zeros(576)
    stream[100] = 1000.0
    rotated = stream @ rotation_matrix(rotation_plan(576, 0), 576)
    np.testing.assert_allclose(np.abs(rotated), 1000 / 24, rtol=1e-12)


def test_a_hadamard_rotation_of_an_unknown_order_is_refused() -> None:
    with pytest.raises(ValueError, match="no Hadamard matrix of order 52"):
        rotation_matrix(RotationPlan(kind="hadamard", seed=0), 52)
