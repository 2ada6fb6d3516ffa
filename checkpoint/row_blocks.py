"""Makes a matrix, or its transpose, some rows at a time: what is worked on stays in the cache, float32 never is whole.

The rows of a transpose are a power of two apart more often than not, so that all lines of a column fall into the same
few sets of the cache. Blocks are therefore gathered in a small buffer first, and go to their places in long runs.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

BlockReader = Callable[[slice, NDArray[Any]], None]
"""Writes the rows from a start to a stop to an array of their shape, rounded to its precision."""

PANEL_ROWS = 256
"""Rows that are transposed together."""

_BLOCK_ELEMENTS = 1 << 17
"""What is handled at once: 512 KB of float32, a part of a core's cache."""

_TILE_ROWS = 64
_TILE_COLUMNS = 512


def array_reader(array: NDArray[Any]) -> BlockReader:
    """Return what reads the rows of an array that is in memory as a whole."""

    def read(rows: slice, out: NDArray[Any]) -> None:
        out[...] = array[rows]

    return read


def block_rows(width: int) -> int:
    """Return how many rows of a width are handled at once."""
    return max(1, min(PANEL_ROWS, _BLOCK_ELEMENTS // max(1, width)))


def row_blocks(shape: tuple[int, int]) -> list[slice]:
    """Return the blocks of a matrix, from top to bottom."""
    height, step = shape[0], block_rows(shape[1])
    return [slice(top, min(top + step, height)) for top in range(0, height, step)]


def fill_by_rows(out: NDArray[Any], fill: Callable[[slice, NDArray[Any]], None], *, transposed: bool = False) -> None:
    """Let `fill` make a matrix block by block.

    Args:
        out: [rows, columns], or [columns, rows] where the matrix is to be transposed; contiguous.
        fill: Called once for each block, from top to bottom, with its rows and where to put them: [rows, columns],
            contiguous.
        transposed: Whether `out` takes the transpose.
    """
    height, width = out.shape[::-1] if transposed else out.shape
    panel = np.empty((min(PANEL_ROWS, height) if transposed else 0, width), out.dtype)
    for top in range(0, height, PANEL_ROWS):
        bottom = min(top + PANEL_ROWS, height)
        place = panel[: bottom - top] if transposed else out[top:bottom]
        for rows in row_blocks((bottom - top, width)):
            fill(slice(top + rows.start, top + rows.stop), place[rows])
        if transposed:
            _store_transposed(out[:, top:bottom], place)


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
