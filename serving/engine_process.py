"""Rows whose runtime computes in a process of its own: a crash of native code ends that process, and not the server."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from mmap import mmap
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any
from weakref import finalize

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.errors import EngineError
from spike_export.engines.generation.slots import KeyValues
from spike_export.engines.runtime_choice import RuntimeChoice
from spike_export.serving.engine_protocol import Order, Shape, shared_logits
from spike_export.serving.hang_watch import HangWatch, cpu_ticks

_COMMAND = (sys.executable, "-P", "-m", "spike_export.serving.engine_child")
"""-P: a file in the working directory must not stand in for a module."""

_PATIENCE = 5.0
"""Seconds that the process gets to end by itself, for instance within the call that it computes."""

can_start = os.name == "posix"
"""Whether this system passes open files to a process, as this module needs."""


class _Block:
    """A block of keys and values that the other process holds."""

    def __init__(self, name: int) -> None:
        self.name = name


class EngineProcess:
    """The process, seen from the server's. Whatever ends it, also between two calls, is told by the next call.

    A process that hangs in a call is ended.

    Attributes:
        clipped: Counts as of the last call; see `CountingSlots`.
        meanwhile: See `ApartSlots`.
    """

    def __init__(self, choice: RuntimeChoice, rows: int, vocab: int, idle_limit: float, call_limit: float) -> None:
        """Start the process, which opens the runtime meanwhile; `open_slots` comes next.

        Args:
            choice: The runtime.
            rows: Most sequences at once.
            vocab: Size of the vocabulary.
            idle_limit: Seconds without processor time within a call, after which the process hangs.
            call_limit: Most seconds of a call.
        """
        memory = _shared_memory(rows * vocab * np.dtype(np.float32).itemsize)
        self._connection, theirs = Pipe()
        self._process = subprocess.Popen(
            [*_COMMAND, str(theirs.fileno()), str(memory)], pass_fds=(theirs.fileno(), memory), stdin=subprocess.DEVNULL
        )
        self._logits = shared_logits(mmap(memory, 0), vocab)
        theirs.close()
        os.close(memory)
        self._dropped: list[int] = []
        self.clipped: Mapping[str, tuple[int, int]] = {}
        self.meanwhile: Callable[[], None] = lambda: None
        self._watch = HangWatch(idle_limit, call_limit, partial(cpu_ticks, self._process.pid))
        finalize(self, _end, self._process, self._connection)
        with suppress(OSError):  # it has ended; the next call says why
            self._connection.send(Order(choice, rows, vocab))

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    def open_slots(self) -> "ProcessSlots":
        """Wait until the runtime is open and return its rows; once.

        Raises:
            EngineError: The runtime cannot be opened, or the process has ended.
        """
        shape: Shape = self._received()
        slots = ProcessSlots(self, shape.rows, shape.context, shape.longest_prompt, shape.chunk)
        return slots if shape.block is None else SavingProcessSlots(**vars(slots), block=shape.block)

    def require_alive(self) -> None:
        """Look whether the process is there, while nothing is asked of it.

        Raises:
            EngineError: It has ended, or hangs.
        """
        self.call("confirm")

    def call(self, method: str, *arguments: Any) -> Any:
        """Return the answer to a request.

        Raises:
            EngineError: The runtime fails, or the process has ended or hangs.
        """
        dropped = [self._dropped.pop() for _ in range(len(self._dropped))]
        try:
            self._connection.send((method, arguments, dropped))
        except OSError as error:
            raise self._death() from error
        self.meanwhile()
        if reason := self._watch.hang(self._arrived):
            self._process.kill()
            raise EngineError(f"the engine's process {reason}, and was ended")
        return self._received()

    def logits(self, method: str, *arguments: Any, rows: int = 1) -> NDArray[np.float32]:
        """Return the logits [rows, vocab] that a request leaves, until the next one does; raises as `call` does."""
        self.call(method, *arguments)
        return self._logits[:rows]

    def block(self, name: int) -> _Block:
        """Return a block that the process holds until nobody holds what is returned."""
        block = _Block(name)
        finalize(block, self._dropped.append, name).atexit = False
        return block

    def _arrived(self, seconds: float) -> bool:
        try:
            return self._connection.poll(seconds)
        except OSError as error:
            raise self._death() from error

    def _received(self) -> Any:
        try:
            done, value, self.clipped = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._death() from error
        if not done:
            raise EngineError(value)
        return value

    def _death(self) -> EngineError:
        try:
            code = self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            return EngineError("the engine's process answers no more")
        if code >= 0:
            return EngineError(f"the engine's process has ended with exit code {code}")
        cause = "; perhaps memory ran out" if -code == signal.SIGKILL else ""
        return EngineError(f"the engine's process was ended by {signal.Signals(-code).name}{cause}")


@dataclass
class ProcessSlots:
    """See `Slots`."""

    process: EngineProcess
    rows: int
    context: int
    longest_prompt: int
    chunk: int | None

    def admit(self, row: int, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Slots`."""
        return self._of_one("admit", row, tokens)

    def extend(self, row: int, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Slots`."""
        return self._of_one("extend", row, tokens)

    def step(self, rows: Sequence[int], tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Slots`."""
        return self.process.logits("step", rows, tokens, rows=len(rows))

    def release(self, row: int, *, spoiled: bool = False) -> None:
        """See `Slots`."""
        self.process.call("release", row, spoiled)

    @property
    def clipped(self) -> Mapping[str, tuple[int, int]]:
        """See `CountingSlots`."""
        return self.process.clipped

    def require_alive(self) -> None:
        """See `ApartSlots`."""
        self.process.require_alive()

    @property
    def meanwhile(self) -> Callable[[], None]:
        """See `ApartSlots`."""
        return self.process.meanwhile

    @meanwhile.setter
    def meanwhile(self, call: Callable[[], None]) -> None:
        self.process.meanwhile = call

    def _of_one(self, method: str, row: int, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = self.process.logits(method, row, tokens)[0]
        return logits


@dataclass
class SavingProcessSlots(ProcessSlots):
    """See `SavingSlots`; keys and values stay in the other process."""

    block: int

    def save(self, row: int, number: int) -> KeyValues:
        """See `SavingSlots`."""
        name, size = self.process.call("save", row, number)
        return KeyValues(self.process.block(name), size)

    def restore(self, row: int, blocks: Sequence[KeyValues]) -> None:
        """See `SavingSlots`."""
        self.process.call("restore", row, [block.content.name for block in blocks])


def _shared_memory(size: int) -> int:
    """Return a file of zeros that lies in memory where the system has such files."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("logits")
    else:
        with tempfile.TemporaryFile() as temporary:
            file = os.dup(temporary.fileno())
    os.truncate(file, size)
    return file


def _end(process: "subprocess.Popen[bytes]", connection: Connection) -> None:
    connection.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_PATIENCE)
    if process.poll() is None:
        process.kill()
        process.wait()
