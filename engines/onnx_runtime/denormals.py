"""Denormal numbers are flushed to zero while ONNX Runtime computes on a thread, and only then.

What a processor does with them says its floating-point environment, which C's `fegetenv` copies into a structure of the
system's own and `fesetenv` takes back.
"""

import ctypes
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

_DENORMAL = np.float32(1e-40)

_ENVIRONMENT_BYTES = 64
"""More than any environment of `_FLAGS` has."""


@dataclass(frozen=True)
class _Flags:
    """Where an environment has the flags.

    Attributes:
        offset: Of the 32-bit word, in bytes.
        mask: The flags, all of which flush.
    """

    offset: int
    mask: int


_FLAGS = {
    # Linux, glibc and musl: MXCSR stands behind the 28 bytes of the x87; flush-to-zero and denormals-are-zero.
    "x86_64": _Flags(28, 1 << 15 | 1 << 6),
    # FPCR is the first word; flush-to-zero.
    "aarch64": _Flags(0, 1 << 24),
}


@contextmanager
def denormals_flushed() -> Iterator[None]:
    """Flush denormals to zero on this thread within the block, and only there.

    A session with `session.set_denormal_as_zero` flushes them on its own threads, but also, from its creation on and
    for good, on the thread that made it: other computations of that thread would silently change.
    """
    flags = _FLAGS.get(platform.machine()) if sys.platform == "linux" else None
    with _flushed_by_torch() if flags is None else _flushed(flags):
        yield


@contextmanager
def _flushed(flags: _Flags) -> Iterator[None]:
    library, before = _mathematics(), ctypes.create_string_buffer(_ENVIRONMENT_BYTES)
    library.fegetenv(before)
    flushing = ctypes.create_string_buffer(before.raw, _ENVIRONMENT_BYTES)
    word = ctypes.c_uint32.from_buffer(flushing, flags.offset)
    word.value |= flags.mask
    library.fesetenv(flushing)
    try:
        yield
    finally:
        library.fesetenv(before)


@cache
def _mathematics() -> Any:
    """Return the C library's part with these functions: in the program itself, or in a file of its own."""
    program = ctypes.CDLL(None)
    return program if hasattr(program, "fesetenv") else ctypes.CDLL("libm.so.6")


@contextmanager
def _flushed_by_torch() -> Iterator[None]:
    """Flush where the environment's form is not known here."""
    import torch

    before = bool(_DENORMAL * np.float32(1) == 0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)
