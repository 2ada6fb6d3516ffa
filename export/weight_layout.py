"""Reads a weight in the precision of the file."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spike_export.calibration.checkpoint import Checkpoint, RowSource

_BLOCK_VALUES = 1 << 22
"""Values read at a time: 16 MiB of float32."""


def stored_tensor(checkpoint: Checkpoint, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Read a tensor in `dtype`; of a source that can read rows, float32 values are never held whole."""
    shape = checkpoint.stored_shape(name)
    if dtype == np.float32 or len(shape) != 2 or not isinstance(checkpoint.tensors, RowSource):
        return checkpoint.tensor(name).astype(dtype, copy=False)
    out = np.empty(shape, dtype)
    rows = max(1, _BLOCK_VALUES // shape[1])
    for start in range(0, shape[0], rows):
        stop = min(start + rows, shape[0])
        out[start:stop] = checkpoint.rows(name, np.arange(start, stop))
    return out
