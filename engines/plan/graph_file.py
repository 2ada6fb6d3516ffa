"""A bundle's model.onnx as a protobuf: structure only, the weights stay in their file."""

from pathlib import Path
from typing import TYPE_CHECKING

from spike_export.artifacts.errors import EngineError, one_line
from spike_export.artifacts.files.documents import require_file

if TYPE_CHECKING:
    import onnx


def read_graph(path: Path) -> "onnx.ModelProto":
    """Read model.onnx without its weights.

    Raises:
        EngineError: The file is missing, not an ONNX model, or holds no valid graph.
    """
    import onnx

    from spike_export.artifacts.graph_gate import graph_fault

    try:
        require_file(path)
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's decode error has no public name that survives its versions
        raise EngineError(f"{path}: not a readable ONNX model ({one_line(error)}); export the bundle again") from error
    fault = graph_fault(model)
    if fault:
        raise EngineError(f"{path}: not a valid ONNX graph: {fault}; export the bundle again")
    return model


def require_output(graph: "onnx.GraphProto", name: str, rank: int, path: Path) -> "onnx.ValueInfoProto":
    """Return a graph's output whose shape is to be changed.

    Raises:
        EngineError: The graph has no such output, or the output declares another number of axes.
    """
    found: onnx.ValueInfoProto | None = next((value for value in graph.output if value.name == name), None)
    if found is None or len(found.type.tensor_type.shape.dim) != rank:
        raise EngineError(f"{path}: the graph has no output {name!r} of {rank} axes; export the bundle again")
    return found
