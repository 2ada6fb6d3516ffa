"""The random numbers that tokens are drawn with: all runtimes draw with the same ones."""

import secrets

import numpy as np
from numpy.typing import NDArray

from spike_export.engines.generation.options import GenerationOptions

_LARGEST_DRAW = 1 - 2.0**-52
"""Times any total it is less than the total, after rounding too: the inverse distribution never runs off its end."""

_SEED_BITS, _FRACTION_BITS = 32, 53
"""What the Mersenne Twister takes of a seed; and what a float64 between 0 and 1 takes of 64 random bits."""


def uniform_draws(options: GenerationOptions, rows: int) -> NDArray[np.float64]:
    """Return all that will be drawn, [max_new_tokens, rows] in [0, 1).

    Row i draws with the generator of seed + i: what a row gets does not depend on the batch that it is in. The numbers
    are those of torch.rand with that seed.
    """
    seed = secrets.randbits(_SEED_BITS) if options.seed is None else options.seed
    return np.stack([_of_row(seed + row, options.max_new_tokens) for row in range(rows)], axis=1)


def _of_row(seed: int, count: int) -> NDArray[np.float64]:
    """Return so many numbers [count] of torch's generator: the 53 low ones of 64 bits, which come high half first."""
    twister = np.random.RandomState(seed % 2**_SEED_BITS)  # its stream of bytes is frozen by numpy's policy
    halves = np.frombuffer(twister.bytes(8 * count), "<u4").astype(np.uint64).reshape(count, 2)
    bits = (halves[:, 0] << np.uint64(32)) | halves[:, 1]
    fractions = (bits % np.uint64(2**_FRACTION_BITS)).astype(np.float64) * 2.0**-_FRACTION_BITS
    return np.minimum(fractions, _LARGEST_DRAW)
