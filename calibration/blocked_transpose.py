"""Transposes a matrix block by block: numpy's own copy of a transpose spends its time on cache misses.

The rows of the result are a power of two apart more often than not, so that all lines of a column fall into the same
few sets of the cache. Blocks are therefore gathered in a small buffer first, and go to their places in long runs.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

PANEL_ROWS = 256
"""Rows of the matrix that are worked on together."""

_TILE_ROWS = 64
_TILE_COLUMNS = 512

Tile = Callable[[slice, slice], NDArray[Any]]
"""Rows and columns of a panel → their values, to be stored."""


def store_transposed(out: NDArray[Any], top: int, bottom: int, tile: Tile) -> None:
    """Store a panel, made tile by tile, as columns `top` to `bottom` of the result.

    Args:
        out: [columns, rows] of the matrix.
        top: First row of the matrix that is in the panel.
        bottom: The row after the last one.
        tile: Called once for each part, with rows counted from `top`; the cache holds what it returns.
    """
    height, width = bottom - top, out.shape[0]
    gathered = np.empty((min(width, _TILE_COLUMNS), height), out.dtype)
    for left in range(0, width, _TILE_COLUMNS):
        columns = slice(left, min(left + _TILE_COLUMNS, width))
        part = gathered[: columns.stop - left]
        for start in range(0, height, _TILE_ROWS):
            rows = slice(start, min(start + _TILE_ROWS, height))
            part[:, rows] = tile(rows, columns).T
        out[columns, top:bottom] = part


def transposed_copy(matrix: NDArray[Any], dtype: DTypeLike) -> NDArray[Any]:
    """Return a matrix's transpose in another precision, contiguous."""
    height, width = matrix.shape
    out = np.empty((width, height), dtype)
    for top in range(0, height, PANEL_ROWS):
        panel = matrix[top : top + PANEL_ROWS]
        store_transposed(out, top, top + len(panel), lambda rows, columns, panel=panel: panel[rows, columns])  # type: ignore[misc]
    return out
