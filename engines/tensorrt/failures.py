"""What torch says of a GPU that does not go on, as one line for users."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from spike_export.artifacts.errors import EngineError, one_line
from spike_export.engines.tensorrt.buffers import REMEDY


@contextmanager
def gpu_failures() -> Iterator[None]:
    """Raise an EngineError for a failure of the GPU in the block."""
    try:
        yield
    except RuntimeError as error:
        remedy = REMEDY if isinstance(error, torch.OutOfMemoryError) else "look at nvidia-smi and the driver's log"
        raise EngineError(f"the GPU stopped: {one_line(error)}; {remedy}") from error
