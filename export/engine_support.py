"""Which engines run a bundle, by the number formats in it."""

from collections.abc import Iterable

from spike_export.calibration.recipe import Dtype

_FLOAT8_GPUS = "SM89 and later"
"""Ada, Hopper, Blackwell: the GPUs that multiply FP8."""


def supporting_engines(dtype: Dtype, formats: Iterable[str]) -> tuple[str, ...]:
    """Return the engines that run a bundle, each with what restricts it.

    Args:
        dtype: Precision of what is not quantized.
        formats: Number formats of the linears, as in the manifest.
    """
    found = set(formats)
    limits = {"onnxruntime": [], "tensorrt": [], "tensorrt-rtx": []}  # type: dict[str, list[str]]
    if "fp8" in found:
        limits["onnxruntime"].append("FP8 rounded to and multiplied in float32")
        limits["tensorrt"].append(_FLOAT8_GPUS)
        limits["tensorrt-rtx"].append(_FLOAT8_GPUS)
    if any(kind.startswith("bfloat16") for kind in (dtype, *found)):
        del limits["onnxruntime"]  # its CPU kernels have no bfloat16 product
    return tuple(name + (f" ({', '.join(limit)})" if limit else "") for name, limit in limits.items())
