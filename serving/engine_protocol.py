"""What the server's process and the engine's process send each other.

After the order, requests are (method, arguments, names of blocks that nobody holds any more). Answers, the first of
which is the shape, are (whether it was done, value or message of an error, counts of clipped activations). Logits do
not travel: they lie in memory that both processes have.
"""

from dataclasses import dataclass
from mmap import mmap

import numpy as np
from numpy.typing import NDArray

from spike_export.engines.runtime_choice import RuntimeChoice


@dataclass(frozen=True)
class Order:
    """What to open; the first message to the process."""

    choice: RuntimeChoice
    rows: int
    vocab: int


@dataclass(frozen=True)
class Shape:
    """What was opened: the attributes of its `Slots`; `block` is None where nothing can be saved."""

    rows: int
    context: int
    longest_prompt: int
    chunk: int | None
    block: int | None


def shared_logits(memory: mmap, vocab: int) -> NDArray[np.float32]:
    """Return the memory that both processes have as [rows, vocab]."""
    return np.frombuffer(memory, np.float32).reshape(-1, vocab)
