"""Weights that lowering makes of the file's: read without the file's graph, and given to a session in memory."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.external_data_helper import ExternalDataInfo

from spike_export.artifacts.errors import EngineError, one_line

Values = Callable[[onnx.TensorProto], NDArray[Any]]
"""Reads an initializer, which may lie in another file."""


@dataclass(frozen=True)
class WeightFile:
    """The file with a bundle's weights.

    It is read here and not by onnx, which refuses a file with several hard links, as copies of a bundle may have.
    """

    path: Path

    def values(self, tensor: onnx.TensorProto) -> NDArray[Any]:
        """Return the values of an initializer, in the graph or in the file.

        Raises:
            EngineError: They cannot be read.
        """
        try:
            return self._read(tensor)
        except (OSError, ValueError, KeyError) as error:
            raise EngineError(
                f"{self.path}: {tensor.name} cannot be read ({one_line(error)}); export the bundle again"
            ) from error

    def _read(self, tensor: onnx.TensorProto) -> NDArray[Any]:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return numpy_helper.to_array(tensor)
        place = ExternalDataInfo(tensor)
        if place.location != self.path.name:
            raise ValueError(f"it is in the file {place.location}")
        dtype, count, start = helper.tensor_dtype_to_np_dtype(tensor.data_type), prod(tensor.dims), place.offset or 0
        if start + count * dtype.itemsize > self.path.stat().st_size:
            raise ValueError("the file ends before")
        return np.fromfile(self.path, dtype, count, offset=start).reshape(tuple(tensor.dims))


def given(name: str, values: NDArray[Any]) -> onnx.TensorProto:
    """Return an initializer without values."""
    tensor = onnx.TensorProto(
        name=name,
        dims=values.shape,
        data_type=helper.np_dtype_to_tensor_dtype(values.dtype),
        data_location=onnx.TensorProto.EXTERNAL,
    )
    tensor.external_data.add(key="location", value="given")
    return tensor
