"""Reads a weight in the precision of the file, and as the graph multiplies with it."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spike_export.calibration.blocked_transpose import PANEL_ROWS, store_transposed
from spike_export.calibration.checkpoint import Checkpoint


def stored_tensor(checkpoint: Checkpoint, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Read a tensor in `dtype`; of a source that can read rows, float32 values are never held whole."""
    shape = checkpoint.stored_shape(name)
    if dtype == np.float32 or len(shape) != 2:
        return checkpoint.tensor(name).astype(dtype, copy=False)
    out, read = np.empty(shape, dtype), checkpoint.row_reader(name)
    for top in range(0, shape[0], PANEL_ROWS):
        bottom = min(top + PANEL_ROWS, shape[0])
        out[top:bottom] = read(slice(top, bottom))
    return out


def transposed_tensor(checkpoint: Checkpoint, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Read a matrix [out, in] in `dtype` as [in, out]; float32 values are not held whole either."""
    (height, width), read = checkpoint.stored_shape(name), checkpoint.row_reader(name)
    out = np.empty((width, height), dtype)
    for top in range(0, height, PANEL_ROWS):
        panel = read(slice(top, min(top + PANEL_ROWS, height)))
        store_transposed(out, top, top + len(panel), lambda rows, columns, panel=panel: panel[rows, columns])  # type: ignore[misc]
    return out
