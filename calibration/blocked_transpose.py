"""Transposes a matrix block by block: numpy's own copy of a transpose spends its time on cache misses.

The rows of the result are a power of two apart more often than not, so that all lines of a column fall into the same
few sets of the cache. Blocks are therefore gathered in a small buffer first, and go to their places in long runs.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

TILE_ROWS = 64
TILE_COLUMNS = 512
_GATHERED_ROWS = 512

Tile = Callable[[slice, slice], NDArray[Any]]
"""Rows and columns → that part of a matrix."""


def transposed(shape: tuple[int, int], dtype: DTypeLike, tile: Tile) -> NDArray[Any]:
    """Return the transpose, contiguous, of a matrix that is made tile by tile.

    Args:
        shape: Of the matrix, [rows, columns].
        dtype: Of the result; a tile's values are converted.
        tile: Makes at most `TILE_ROWS` by `TILE_COLUMNS` values; called once for each part.

    Returns:
        [columns, rows].
    """
    height, width = shape
    out = np.empty((width, height), dtype)
    gathered = np.empty((min(width, TILE_COLUMNS), min(height, _GATHERED_ROWS)), dtype)
    for top in range(0, height, _GATHERED_ROWS):
        bottom = min(top + _GATHERED_ROWS, height)
        for left in range(0, width, TILE_COLUMNS):
            right = min(left + TILE_COLUMNS, width)
            for start in range(top, bottom, TILE_ROWS):
                stop = min(start + TILE_ROWS, bottom)
                gathered[: right - left, start - top : stop - top] = tile(slice(start, stop), slice(left, right)).T
            out[left:right, top:bottom] = gathered[: right - left, : bottom - top]
    return out


def transposed_copy(matrix: NDArray[Any], dtype: DTypeLike) -> NDArray[Any]:
    """Return a matrix's transpose in another precision, contiguous."""
    height, width = matrix.shape
    return transposed((height, width), dtype, lambda rows, columns: matrix[rows, columns])
