"""Reads a weight in the precision of the file, and as the graph multiplies with it."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spike_export.calibration.checkpoint import Checkpoint
from spike_export.calibration.row_blocks import converted


def stored_tensor(checkpoint: Checkpoint, name: str, dtype: np.dtype[Any], *, transposed: bool = False) -> NDArray[Any]:
    """Read a tensor in `dtype`; a matrix [out, in] as [in, out] if wanted.

    Of a source that can read rows, float32 values are never held whole for a matrix in 16 bit.
    """
    shape = checkpoint.stored_shape(name)
    if len(shape) != 2 or (dtype == np.float32 and not transposed):
        return checkpoint.tensor(name).astype(dtype, copy=False)
    height, width = shape
    with checkpoint.block_reader(name) as read:
        return converted((height, width), read, dtype, transposed=transposed)
