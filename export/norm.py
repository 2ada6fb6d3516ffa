"""Root-mean-square norms."""

import onnx_ir as ir

from spike_export.export.emission import Emission

FLOAT = ir.DataType.FLOAT


def rms_norm(emission: Emission, module: str, value: ir.Value) -> ir.Value:
    """Append an RMSNorm over the last axis: an FP32 island, whose FP32 output feeds quantizers without a round trip.

    Args:
        emission: The graph.
        module: HF name, e.g. `model.layers.0.input_layernorm`.
        value: [..., channels] in any precision.
    """
    b, name = emission.builder, f"{module}.weight"
    gain = b.lazy(name, FLOAT, emission.linears.shapes[name], lambda: emission.checkpoint.tensor(name))
    attributes = {"axis": -1, "epsilon": emission.config.rms_norm_eps}
    return b.op("RMSNormalization", [b.cast(value, FLOAT), gain], module, attributes=attributes)
