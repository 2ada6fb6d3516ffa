"""The largest memory a process ever held, and a way to give a measurement a process of its own."""

import multiprocessing
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")


def in_own_process(measure: Callable[..., Result], *arguments: object) -> Result:
    """Return what `measure`, a function of a module, returns in a fresh process."""
    # Not multiprocessing's own pool, which would wait forever for a process that was killed for its memory.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def peak_rss() -> int:
    """Return the most resident memory, in bytes, that this process held so far.

    On Linux from /proc, because the maximum that getrusage tells is inherited from the parent.
    """
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii", errors="replace").splitlines() if status.exists() else []
    kilobytes = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
    if kilobytes is not None:
        return kilobytes * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
