"""Orthogonal matrices that rotate the residual stream: Hadamard matrices with random signs, or random orthogonal ones.

A rotation spreads a few large channels over all of them, so that one INT8 scale fits them better. Folded into the
weights it leaves the model's function as it is (source: QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406).
"""

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.recipe import RotationPlan

Matrix = NDArray[np.float64]


def rotation_plan(width: int, seed: int) -> RotationPlan:
    """Return the kind of rotation that a width allows."""
    return RotationPlan(kind="orthogonal" if _hadamard(width) is None else "hadamard", seed=seed)


def rotation_matrix(plan: RotationPlan, width: int) -> Matrix:
    """Return the orthogonal [width, width] matrix of a plan; the same for the same plan.

    Raises:
        ValueError: A Hadamard matrix of this width is not known.
    """
    generator = np.random.default_rng(plan.seed)
    if plan.kind == "orthogonal":
        factor, triangle = np.linalg.qr(generator.standard_normal((width, width)))
        # The signs make the distribution uniform over all orthogonal matrices (Mezzadri, math-ph/0609050).
        return np.asarray(factor * np.sign(np.diag(triangle)))
    matrix = _hadamard(width)
    if matrix is None:
        raise ValueError(f"no Hadamard matrix of order {width} is known to this construction")
    # In place: at width 8192 each copy would take half a gigabyte.
    matrix *= generator.choice((-1.0, 1.0), width)[:, None]
    matrix /= np.sqrt(width)
    return matrix


def _hadamard(order: int) -> Matrix | None:
    """Return a Hadamard matrix by Paley's constructions and Sylvester's doubling, or None where they yield none."""
    if order == 1:
        return np.ones((1, 1))
    if order == 2:
        return np.array([[1.0, 1.0], [1.0, -1.0]])
    if order % 4:
        return None
    if _is_prime(order - 1):
        return _paley_one(order - 1)
    half = order // 2 - 1
    if half % 4 == 1 and _is_prime(half):
        return _paley_two(half)
    smaller = _hadamard(order // 2)
    return None if smaller is None else np.block([[smaller, smaller], [smaller, -smaller]])


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _jacobsthal(prime: int) -> Matrix:
    """Return Q[i, j] = chi(i - j), the quadratic character modulo a prime."""
    character = np.full(prime, -1.0)
    character[np.arange(1, prime, dtype=np.int64) ** 2 % prime] = 1.0
    character[0] = 0.0
    index = np.arange(prime)
    return np.asarray(character[(index[:, None] - index[None, :]) % prime])


def _paley_one(prime: int) -> Matrix:
    """Order prime + 1, for a prime that is 3 modulo 4: the identity plus a skew conference matrix."""
    conference = np.zeros((prime + 1, prime + 1))
    conference[0, 1:], conference[1:, 0] = 1.0, -1.0
    conference[1:, 1:] = _jacobsthal(prime)
    return conference + np.eye(prime + 1)


def _paley_two(prime: int) -> Matrix:
    """Order 2 (prime + 1), for a prime that is 1 modulo 4, from a symmetric conference matrix."""
    conference = np.zeros((prime + 1, prime + 1))
    conference[0, 1:] = conference[1:, 0] = 1.0
    conference[1:, 1:] = _jacobsthal(prime)
    plus, minus = np.array([[1.0, 1.0], [1.0, -1.0]]), np.array([[1.0, -1.0], [-1.0, -1.0]])
    return np.asarray(np.kron(conference, plus) + np.kron(np.eye(prime + 1), minus))
