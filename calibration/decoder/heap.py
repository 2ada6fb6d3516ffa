"""Gives freed memory back to the operating system between forward passes.

glibc keeps freed activation blocks (5 to 12 MB each) in its heap, and the small results that are kept between them
pin the heap's end: resident memory then grows with every pass, to several times the model.
"""

import ctypes
import ctypes.util
import functools
import gc
from collections.abc import Callable


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """Return glibc's `malloc_trim`, or None where the C library has none."""
    name = ctypes.util.find_library("c")
    if name is None:
        return None
    try:
        trim: Callable[[int], int] = ctypes.CDLL(name).malloc_trim
    except (OSError, AttributeError):
        return None
    return trim


def return_freed_memory() -> None:
    """Return what the heap holds but nobody uses; does nothing where the C library cannot."""
    trim = _trim()
    if trim is not None:
        trim(0)


def collect_and_return_memory() -> None:
    """Free what only reference cycles keep (torch modules are full of them), and return it."""
    gc.collect()
    return_freed_memory()
