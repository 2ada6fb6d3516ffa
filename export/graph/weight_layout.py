"""Reads a weight in the precision of the file, and as the graph multiplies with it."""

from typing import Any

from numpy.typing import NDArray

from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.checkpoint.row_blocks import fill_by_rows


def read_matrix(checkpoint: Checkpoint, name: str, out: NDArray[Any], *, transposed: bool = False) -> None:
    """Read a matrix into `out`, in its precision; as [in, out] where it is to be transposed.

    Of a source that can read rows, float32 values are never held whole.
    """
    with checkpoint.block_reader(name) as read:
        fill_by_rows(out, read, transposed=transposed)
