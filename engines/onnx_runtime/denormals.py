"""Denormal numbers are flushed to zero while ONNX Runtime computes on a thread, and only then."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

_DENORMAL = np.float32(1e-40)


@contextmanager
def denormals_flushed() -> Iterator[None]:
    """Flush denormals to zero on this thread within the block, and only there.

    A session with `session.set_denormal_as_zero` flushes them on its own threads, but also, from its creation on and
    for good, on the thread that made it: other computations of that thread would silently change.
    """
    import torch

    before = bool(_DENORMAL * np.float32(1) == 0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)
