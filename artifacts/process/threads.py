"""How many threads this process and those it starts compute with: what `OMP_NUM_THREADS` says, for every library."""

import os
import sys

from spike_export.artifacts.errors import EngineError

VARIABLE = "OMP_NUM_THREADS"
"""torch, MKL and oneDNN read it when they are loaded; processes inherit it."""


def allowed_threads() -> int | None:
    """Return how many threads one operator may use, or None where nobody has said so."""
    first = os.environ.get(VARIABLE, "").partition(",")[0].strip()  # the rest is of nested levels
    return int(first) if first.isdecimal() and int(first) > 0 else None


def workers(most: int) -> int:
    """Return how many threads to share independent tasks among: `most`, or fewer where fewer are there or allowed."""
    return min(most, allowed_threads() or os.cpu_count() or 1)


def require_threads(threads: int) -> None:
    """Refuse a number of threads that this machine cannot run at once.

    Raises:
        EngineError: Names the number and the bounds.
    """
    most = os.cpu_count() or 1
    if not 1 <= threads <= most:
        raise EngineError(f"{threads} threads: this machine has {most} processors; give --threads 1 to {most}")


def allow_threads(threads: int) -> None:
    """Let this process and those it starts use so many threads, also where torch is loaded already.

    Raises:
        EngineError: This machine cannot run so many at once.
    """
    require_threads(threads)
    os.environ[VARIABLE] = str(threads)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)
