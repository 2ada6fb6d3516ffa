"""Which kernels ONNX Runtime's `GroupQueryAttention` computes with on a CPU.

Its tiled kernels keep no row of scores. For one token of each row they are slower than the kernels that do: they add up
in four lanes, and take rows of different lengths one after another, each too small to be shared among threads. The
scores of a prompt take little memory, because it is read in parts (docs/decisions/generation.md).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

TILED_OFF = "ORT_GQA_DISABLE_FLASH_ATTENTION"
"""Variable of the environment that ONNX Runtime reads when it makes the operator."""


@contextmanager
def scores_in_rows() -> Iterator[None]:
    """Let a session that is made within the block keep scores, unless the user has set the variable.

    A version of ONNX Runtime without tiled kernels does not read it.
    """
    if TILED_OFF in os.environ:
        yield
        return
    os.environ[TILED_OFF] = "1"
    try:
        yield
    finally:
        os.environ.pop(TILED_OFF, None)
