"""Which engines run a bundle, by the number formats in it."""

from collections.abc import Iterable, Mapping

from spike_export.artifacts.recipe import Dtype

_ENGINES = ("onnxruntime", "tensorrt", "tensorrt-rtx")

_FLOAT8_LIMITS: Mapping[str, str] = {
    "onnxruntime": "FP8 rounded to and multiplied in float32",
    "tensorrt": "SM89 and later",
    "tensorrt-rtx": "SM89 and later",
}
"""Ada, Hopper and Blackwell multiply FP8."""


def supporting_engines(dtype: Dtype, formats: Iterable[str], *, scattered: str = "") -> tuple[str, ...]:
    """Return the engines that run a bundle, each with what restricts it.

    Args:
        dtype: Precision of what is not quantized.
        formats: Number formats of the linears, as in the manifest.
        scattered: Type of a cache that is written in place.
    """
    found = set(formats)
    limits = _FLOAT8_LIMITS if "fp8" in found else {}
    # ONNX Runtime's CPU kernels have no bfloat16 product.
    lacking = {"onnxruntime"} if any(kind.startswith("bfloat16") for kind in (dtype, *found)) else set()
    if scattered == "int8":
        lacking |= {"tensorrt", "tensorrt-rtx"}  # their TensorScatter takes no INT8
    return tuple(name + (f" ({limits[name]})" if name in limits else "") for name in _ENGINES if name not in lacking)
