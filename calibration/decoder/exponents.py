"""Scales of many channels as text: one signed byte k each, for 2 ** (k / 8), in Base64."""

import base64

import numpy as np
from numpy.typing import NDArray

STEPS_PER_OCTAVE = 8

Floats = NDArray[np.float32]


def encode_exponents(exponents: NDArray[np.int8]) -> str:
    """Return exponents [channels] as text."""
    return base64.b64encode(exponents.tobytes()).decode("ascii")


def decode_scales(text: str) -> Floats:
    """Return the scales [channels] that a text stands for.

    Raises:
        ValueError: The text is not Base64.
    """
    exponents = np.frombuffer(base64.b64decode(text, validate=True), np.int8)
    return np.asarray(np.exp2(exponents.astype(np.float64) / STEPS_PER_OCTAVE), np.float32)
