"""A bundle's model.onnx as a protobuf: structure only, the weights stay in their file."""

from pathlib import Path
from typing import TYPE_CHECKING

from spike_export.artifacts.errors import EngineError, one_line

if TYPE_CHECKING:
    import onnx


def read_graph(path: Path) -> "onnx.ModelProto":
    """Read model.onnx without its weights.

    Raises:
        EngineError: The file is missing or not an ONNX model.
    """
    import onnx

    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's decode error has no public name that survives its versions
        raise EngineError(f"{path}: not a readable ONNX model ({one_line(error)}); export the bundle again") from error
