"""Root-mean-square norms."""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spike_export.export.graph.emission import Emission

FLOAT = ir.DataType.FLOAT


def rms_norm(emission: Emission, module: str, value: ir.Value, divisors: NDArray[np.float32] | None = None) -> ir.Value:
    """Append an RMSNorm over the last axis: an FP32 island, whose FP32 output feeds quantizers without a round trip.

    Args:
        emission: The graph.
        module: HF name, e.g. `model.layers.0.input_layernorm`.
        value: [..., channels] in any precision.
        divisors: [channels] of the output's channels, taken into the gain.
    """
    b, config, name = emission.builder, emission.config, f"{module}.weight"
    offset = np.float32(config.family.norm_offset)

    def gain() -> NDArray[np.float32]:
        weight = emission.checkpoint.tensor(name)
        whole = weight + offset if offset else weight
        return whole if divisors is None else whole / divisors

    # With an offset or divisors it is not the checkpoint's tensor, and does not bear its name.
    stored = name if not offset and divisors is None else f"{module}.gain"
    multiplier = b.lazy(stored, FLOAT, emission.linears.shapes[name], gain)
    attributes = {"axis": -1, "epsilon": config.rms_norm_eps}
    return b.op("RMSNormalization", [b.cast(value, FLOAT), multiplier], module, attributes=attributes)
