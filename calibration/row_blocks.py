"""Makes a matrix, or its transpose, some rows at a time: what is worked on stays in the cache, float32 never is whole.

The rows of a transpose are a power of two apart more often than not, so that all lines of a column fall into the same
few sets of the cache. Blocks are therefore gathered in a small buffer first, and go to their places in long runs.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

BlockReader = Callable[[slice, NDArray[np.float32]], None]
"""Writes the rows from a start to a stop to an array of their shape."""

PANEL_ROWS = 256
"""Rows that are transposed together."""

_BLOCK_ELEMENTS = 1 << 17
"""What is handled at once: 512 KB of float32, a part of a core's cache."""

_TILE_ROWS = 64
_TILE_COLUMNS = 512


def block_rows(width: int) -> int:
    """Return how many rows of a width are handled at once."""
    return max(1, min(PANEL_ROWS, _BLOCK_ELEMENTS // max(1, width)))


def row_blocks(shape: tuple[int, int]) -> list[slice]:
    """Return the blocks of a matrix, from top to bottom."""
    height, step = shape[0], block_rows(shape[1])
    return [slice(top, min(top + step, height)) for top in range(0, height, step)]


def filled_by_rows(
    shape: tuple[int, int], dtype: DTypeLike, fill: Callable[[slice, NDArray[Any]], None], *, transposed: bool
) -> NDArray[Any]:
    """Return a matrix that `fill` makes block by block, or its transpose, contiguous.

    Args:
        shape: [rows, columns] of the matrix.
        dtype: Of the result.
        fill: Called once for each block, from top to bottom, with its rows and where to put them: [rows, columns].
        transposed: Whether the result is [columns, rows].
    """
    height, width = shape
    out = np.empty((width, height) if transposed else shape, dtype)
    panel = np.empty((min(PANEL_ROWS, height) if transposed else 0, width), dtype)
    for top in range(0, height, PANEL_ROWS):
        bottom = min(top + PANEL_ROWS, height)
        place = panel[: bottom - top] if transposed else out[top:bottom]
        for rows in row_blocks(place.shape):
            fill(slice(top + rows.start, top + rows.stop), place[rows])
        if transposed:
            _store_transposed(out[:, top:bottom], place)
    return out


def converted(shape: tuple[int, int], read: BlockReader, dtype: DTypeLike, *, transposed: bool = False) -> NDArray[Any]:
    """Return a matrix [rows, columns] in another precision, or its transpose, contiguous."""
    block = np.empty((block_rows(shape[1]), shape[1]), np.float32)

    def convert(rows: slice, place: NDArray[Any]) -> None:
        values = place if place.dtype == np.float32 else block[: len(place)]
        read(rows, values)
        if values is not place:
            place[...] = values

    return filled_by_rows(shape, dtype, convert, transposed=transposed)


def _store_transposed(out: NDArray[Any], panel: NDArray[Any]) -> None:
    height, width = panel.shape
    gathered = np.empty((min(width, _TILE_COLUMNS), height), panel.dtype)
    for left in range(0, width, _TILE_COLUMNS):
        columns = slice(left, min(left + _TILE_COLUMNS, width))
        part = gathered[: columns.stop - left]
        for top in range(0, height, _TILE_ROWS):
            rows = slice(top, min(top + _TILE_ROWS, height))
            part[:, rows] = panel[rows, columns].T
        out[columns] = part
