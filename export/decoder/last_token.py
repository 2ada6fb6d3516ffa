"""Logits of the last token only: everything behind the last layer's attention is computed for one position.

Behind that point positions no longer meet, so that the result is the last row of what all positions would give. In a
batch with left padding the last column is every row's last token; right padding would need a place per row.
"""

import numpy as np
import onnx_ir as ir

from spike_export.artifacts.manifest import LAST_TOKEN_NODE
from spike_export.export.graph.emission import Emission


def last_token(emission: Emission, hidden: ir.Value) -> ir.Value:
    """Append the choice of the last position: [batch, sequence, hidden] → [batch, 1, hidden]."""
    b = emission.builder
    bounds = [b.integers(-1), b.integers(np.iinfo(np.int64).max), b.integers(1)]
    return b.op("Slice", [hidden, *bounds], LAST_TOKEN_NODE.removesuffix(".Slice"))
