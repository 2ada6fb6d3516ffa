"""All logits of a bundle that gives only the last token's: the same graph without the one node that drops the others.

A check needs the logits of every token. The graph is changed in memory and reads the bundle's own weights, so that
nothing is exported or stored a second time, and what is checked differs from what is shipped in this node alone.
"""

from pathlib import Path

from spike_export.artifacts.errors import EngineError
from spike_export.artifacts.manifest import GRAPH_FILE, LAST_TOKEN_NODE
from spike_export.engines.plan.graph_file import read_graph, require_output


def all_logits_graph(bundle: Path) -> bytes:
    """Return a serialized last-token graph without its last-token node; weights are named as files in the bundle.

    Raises:
        EngineError: The file is not an ONNX model, or the graph has no such node although the manifest says so.
    """
    path = bundle / GRAPH_FILE
    model = read_graph(path)
    graph = model.graph
    choice = next((node for node in graph.node if node.name == LAST_TOKEN_NODE), None)
    if choice is None:
        raise EngineError(f"{path}: no node is named {LAST_TOKEN_NODE}; the graph was changed, export the bundle again")
    whole, last = choice.input[0], choice.output[0]
    graph.node.remove(choice)
    for node in graph.node:
        node.input[:] = [whole if name == last else name for name in node.input]
    logits = require_output(graph, "logits", 3, path)
    logits.type.tensor_type.shape.dim[1].dim_param = "sequence"
    serialized: bytes = model.SerializeToString()
    return serialized
