"""Products of float32 matrices have the same bits in every run: set before torch is loaded, in the command's process.

docs/decisions/threads.md has the measurements.
"""

from collections.abc import MutableMapping

VARIABLE = "MKL_CBWR"
"""MKL, which multiplies torch's matrices, reads it at its first product."""


def multiply_repeatably(environment: MutableMapping[str, str]) -> None:
    """Let MKL add up in the same order, whatever the number of threads and the place of a matrix in memory.

    Does nothing where the user has chosen.
    """
    environment.setdefault(VARIABLE, "AUTO,STRICT")
