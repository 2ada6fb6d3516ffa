"""A graph without branches, for compilers: what a branch would skip is computed, and adds nothing."""

import onnx


def inline_branches(model: onnx.ModelProto) -> None:
    """Replace every If by its `then_branch`, in place.

    Export writes branches only around what may be skipped but does no harm: an expert that no token is sent to adds
    nothing to the sum. Compilers merge the products of neighbouring experts, which branches would keep apart, and a
    branch costs a GPU a round trip to the host.
    """
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type != "If":
            nodes.append(node)
            continue
        branch = next(attribute.g for attribute in node.attribute if attribute.name == "then_branch")
        model.graph.initializer.extend(branch.initializer)
        nodes.extend(branch.node)
        nodes.append(onnx.helper.make_node("Identity", [branch.output[0].name], node.output, name=node.name))
    # Copies: what the list holds belongs to the nodes that are deleted.
    flat = onnx.GraphProto(node=nodes).node
    del model.graph.node[:]
    model.graph.node.extend(flat)
