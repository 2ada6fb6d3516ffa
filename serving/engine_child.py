"""The engine's process: opens a runtime and computes what the server's process asks for, call by call."""

import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from mmap import mmap
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.errors import SpikeExportError, one_line
from spike_export.engines.generation.slots import CountingSlots, KeyValues, SavingSlots, Slots
from spike_export.serving.engine_protocol import Order, Shape, shared_logits

Clipped = Mapping[str, tuple[int, int]]


def clipped(slots: Slots) -> Clipped:
    """Return the counts of clipped activations so far; see `CountingSlots`."""
    return slots.clipped if isinstance(slots, CountingSlots) else {}


@dataclass
class _Rows:
    """The methods of `Slots`, as the other process calls them."""

    slots: Slots
    logits: NDArray[np.float32]
    _saved: dict[int, KeyValues] = field(default_factory=dict)
    _names: "count[int]" = field(default_factory=count)

    def admit(self, row: int, tokens: NDArray[np.int64]) -> None:
        self.logits[0] = self.slots.admit(row, tokens)

    def extend(self, row: int, tokens: NDArray[np.int64]) -> None:
        self.logits[0] = self.slots.extend(row, tokens)

    def step(self, rows: Sequence[int], tokens: NDArray[np.int64]) -> None:
        self.logits[: len(rows)] = self.slots.step(rows, tokens)

    def release(self, row: int, spoiled: bool) -> None:
        self.slots.release(row, spoiled=spoiled)

    def save(self, row: int, number: int) -> tuple[int, int]:
        """Return name and bytes of a block."""
        assert isinstance(self.slots, SavingSlots), "the shape says so"
        name = next(self._names)
        self._saved[name] = self.slots.save(row, number)
        return name, self._saved[name].bytes

    def restore(self, row: int, names: Sequence[int]) -> None:
        assert isinstance(self.slots, SavingSlots), "the shape says so"
        self.slots.restore(row, [self._saved[name] for name in names])

    def confirm(self) -> None:
        """Do nothing: the answer is what is asked for."""

    def forget(self, names: Sequence[int]) -> None:
        for name in names:
            del self._saved[name]

    def answer(self, method: str, arguments: Sequence[Any], dropped: Sequence[int]) -> tuple[bool, Any, Clipped]:
        """Carry out a request."""
        try:
            self.forget(dropped)
            return True, getattr(self, method)(*arguments), clipped(self.slots)
        except SpikeExportError as error:
            return False, str(error), {}
        except Exception as error:
            return False, one_line(error), {}


def main(connection: Connection, memory: int) -> None:
    """Compute until the other process closes its end, or ends.

    Signals to stop are that process's to obey: it lets running requests end first.
    """
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    try:
        order: Order = connection.recv()
        try:
            decoding, slots = order.choice.open_rows(order.rows)
        except (SpikeExportError, OSError) as error:
            connection.send((False, one_line(error), {}))
            return
        block = slots.block if isinstance(slots, SavingSlots) else None
        shape = Shape(slots.rows, slots.context, slots.longest_prompt, slots.chunk, block)
        connection.send((True, shape, clipped(slots)))
        rows = _Rows(slots, shared_logits(mmap(memory, 0), order.vocab))
        try:
            while True:
                connection.send(rows.answer(*connection.recv()))
        finally:
            decoding.close()
    except (EOFError, OSError):
        return


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])), int(sys.argv[2]))
