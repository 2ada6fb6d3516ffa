"""What a scheduler needs of a runtime: places for sequences that come and go independently of each other."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

BLOCK = 32
"""Tokens whose keys and values are saved together: prompts that begin alike save whole blocks only."""


@dataclass(frozen=True, eq=False, slots=True)
class KeyValues:
    """Keys and values of a block of a row's tokens, saved for other rows.

    Attributes:
        content: The runtime's own.
        bytes: How much memory it takes.
    """

    content: Any
    bytes: int


class Slots(Protocol):
    """Rows that hold one sequence each.

    Logits are those behind the last token fed, float32; the next call that gives some may overwrite them.

    Attributes:
        rows: Most sequences at once.
        context: Most own tokens of a sequence; the prefix is not counted.
        longest_prompt: Most tokens of a prompt.
        chunk: Most tokens that a prompt may be cut into; None where it has to be read in one call.
    """

    @property
    def rows(self) -> int: ...  # noqa: D102

    @property
    def context(self) -> int: ...  # noqa: D102

    @property
    def longest_prompt(self) -> int: ...  # noqa: D102

    @property
    def chunk(self) -> int | None: ...  # noqa: D102

    def admit(self, row: int, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Begin a sequence with tokens [sequence] in a free row; return logits [vocab].

        Raises:
            EngineError: The tokens do not fit, or the runtime fails.
        """

    def extend(self, row: int, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append tokens [sequence] to a row; return logits [vocab].

        Raises:
            EngineError: The tokens do not fit, or the runtime fails.
        """

    def step(self, rows: Sequence[int], tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append one of tokens [rows] to each of some rows; return logits [rows, vocab].

        Raises:
            EngineError: A row is full, or the runtime fails.
        """

    def release(self, row: int, *, spoiled: bool = False) -> None:
        """Free a row.

        Args:
            row: The row.
            spoiled: Its logits were not finite, so that its keys and values may not be either: nothing of them may
                reach the row's next sequence.
        """


@runtime_checkable
class SavingSlots(Slots, Protocol):
    """Rows whose keys and values can be saved and given to other rows.

    Attributes:
        block: Tokens by which they are saved.
    """

    @property
    def block(self) -> int: ...  # noqa: D102

    def save(self, row: int, number: int) -> KeyValues:
        """Return keys and values of a block of a row's own tokens; blocks are counted from 0."""

    def restore(self, row: int, blocks: Sequence[KeyValues]) -> None:
        """Begin a sequence in a free row with the saved blocks of its first tokens, instead of reading them.

        Raises:
            EngineError: The tokens do not fit.
        """


@runtime_checkable
class CountingSlots(Slots, Protocol):
    """Rows of a runtime that counts activations beyond the range of their static scales in some of its calls.

    Attributes:
        clipped: Group of modules → (values beyond the range, all values) so far; empty where nothing is counted.
    """

    @property
    def clipped(self) -> Mapping[str, tuple[int, int]]: ...  # noqa: D102


@runtime_checkable
class ApartSlots(Slots, Protocol):
    """Rows of a runtime in another process: it can end while nobody asks it anything, and computes beside this one.

    Attributes:
        meanwhile: Called in each call, once the runtime has been told what to do and before its answer is waited for.
    """

    meanwhile: Callable[[], None]

    def require_alive(self) -> None:
        """Look whether the runtime is there.

        Raises:
            EngineError: It has ended, or hangs.
        """


@runtime_checkable
class SlotRuntime(Protocol):
    """A `Decoding` whose sequences can come and go."""

    def open_slots(self, rows: int) -> Slots:
        """Return `rows` free rows, or fewer where the runtime has no more.

        Raises:
            EngineError: The runtime has none, or not enough memory.
        """
