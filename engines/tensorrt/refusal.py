"""What TensorRT says against a graph, fit for one line."""

from typing import Any

_LONGEST_REASON = 600
"""Characters of a TensorRT message that are shown; some quote whole graphs."""


def describe_refusal(parser: Any) -> str:
    """Return what an `OnnxParser` or `OnnxParserRefitter` says against a graph, to stand behind its name."""
    faults = [parser.get_error(index) for index in range(parser.num_errors)]
    if not faults:
        return "cannot take the graph and gives no reason; export the bundle again"
    fault = faults[0]
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"refuses node {fault.node_name()!r} ({fault.node_operator()}): {shorten(fault.desc())}{more}"


def shorten(message: str) -> str:
    """Return a message of TensorRT on one line, cut where it is long."""
    line = " ".join(message.split())
    return line if len(line) <= _LONGEST_REASON else line[:_LONGEST_REASON] + " …"
