"""Whether a build fits into this machine's memory, asked before it starts."""

from spike_export.artifacts.errors import EngineError

_GIB = 1 << 30


def estimate_build_memory(weight_bytes: int, profiles: int) -> int:
    """Return an upper estimate of the build process's peak memory, in bytes.

    Fitted to builds of 0.2 to 2.3 GB of weights with TensorRT-RTX 1.7: peaks lay between 3.1 and 4.1 times the
    weights with one profile and between 4.7 and 5.9 times with two.
    """
    return _GIB // 2 + weight_bytes * (2 + 2 * profiles)


def require_memory(weight_bytes: int, profiles: int, available: int | None) -> None:
    """Refuse a build that would run out of memory.

    Raises:
        EngineError: The estimate exceeds what is available; both figures and the ways out are named.
    """
    needed = estimate_build_memory(weight_bytes, profiles)
    if available is None or needed <= available:
        return
    split = "build the profiles one by one (--profiles split), " if profiles > 1 else ""
    raise EngineError(
        f"the build needs about {needed / _GIB:.1f} GiB of memory ({weight_bytes / _GIB:.1f} GiB of weights, "
        f"{profiles} profile{'s' if profiles > 1 else ''}) and {available / _GIB:.1f} GiB are available; "
        f"{split}free memory, use a larger machine, or build anyway with --ignore-memory"
    )
