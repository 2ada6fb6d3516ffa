"""The thread that computes: takes sequences in, runs turns, hands events out, and begins anew once after a failure."""

import gc
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from queue import Empty, SimpleQueue
from typing import Literal

from spike_export.artifacts.errors import EngineError, one_line
from spike_export.serving.scheduling.batch import Batch, Event, Work, ends

State = Literal["ready", "restarting", "stopped"]

Deliver = Callable[[int, Event], None]
"""Takes the events of a request: the number of its sequence, counted from 0, and the event. Called on the thread."""

_Command = Callable[[], None]

_LOOK_SECONDS = 0.5
"""How long the thread waits for work before it looks whether the runtime is still there."""


class QueueFullError(EngineError):
    """As many sequences wait as may."""


class UnavailableError(EngineError):
    """The engine has failed and computes nothing, now or for good."""


@dataclass(frozen=True)
class Ticket:
    """The keys of a request's sequences."""

    keys: tuple[int, ...]


class Worker:
    """Runs a batch on a thread of its own.

    Where the runtime has a process of its own, events are handed out while that process carries out its next call: who
    receives them takes the interpreter for itself, and the runtime would stand still meanwhile.

    A failure of the runtime ends every sequence with an error. The batch is then opened anew; after a second failure
    the worker stays stopped.
    """

    def __init__(self, open_batch: Callable[[], Batch], places: int, on_failure: Callable[[str], None]) -> None:
        """Open the batch.

        Args:
            open_batch: Opens the runtime; called again after a failure.
            places: Most sequences at once, running and waiting together.
            on_failure: Told of each failure of the runtime, in a line.
        """
        self._open_batch, self._places, self._on_failure = open_batch, places, on_failure
        self._batch: Batch | None = None
        self._events: list[tuple[int, Event]] = []
        self._open()
        self._inbox: SimpleQueue[_Command] = SimpleQueue()
        self._deliver: dict[int, tuple[Deliver, int]] = {}
        self._keys = count()
        self._taken, self._lock = 0, threading.Lock()
        self._closing = False
        self.state: State = "ready"
        self.restarts = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Number of sequences with a row."""
        batch = self._batch  # the thread may let it go meanwhile
        return 0 if batch is None else batch.running

    @property
    def waiting(self) -> int:
        """Number of sequences without one, those on their way to the thread included."""
        return max(0, self._taken - self.running)

    @property
    def clipped(self) -> Mapping[str, tuple[int, int]]:
        """Activations that were clipped since the runtime was opened; see `CountingSlots`."""
        batch = self._batch
        return {} if batch is None else batch.clipped

    def submit(self, works: Sequence[Work], deliver: Deliver) -> Ticket:
        """Let the sequences of a request be generated, all or none.

        Raises:
            QueueFullError: There is no place for all of them.
            UnavailableError: The engine has failed.
        """
        if self.state != "ready":
            raise UnavailableError(f"the engine is {self.state} after a failure")
        with self._lock:
            if self._taken + len(works) > self._places:
                raise QueueFullError(f"{self._taken} sequences are in progress or wait, and {self._places} may")
            self._taken += len(works)
        ticket = Ticket(tuple(next(self._keys) for _ in works))
        self._inbox.put(lambda: self._take(ticket, works, deliver))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Stop a request's sequences before the next turn; nothing happens to those that have ended."""
        self._inbox.put(lambda: self._drop(ticket))

    def close(self) -> None:
        """Stop the thread after the turn that it computes."""
        self._closing = True
        self._inbox.put(lambda: None)
        self._thread.join()
        self._let_go()

    def _open(self) -> None:
        self._batch = self._open_batch()
        self._overlaps = self._batch.overlap(self._hand_out_events)

    def _run(self) -> None:
        while not self._closing:
            reason = self._turn_failure()
            if reason is not None:
                self._restart(reason)
        self._hand_out_events()

    def _turn_failure(self) -> str | None:
        """Compute a turn; return why it failed.

        The error itself must not live on: its traceback holds the runtime, which is to be let go before the next one.
        Native code may panic with an error that is no `Exception`; it must not end the service silently either.
        """
        try:
            self._next_turn()
        except BaseException as error:
            return one_line(error)
        return None

    def _next_turn(self) -> None:
        self._obey()
        if self._batch is None or self._closing:
            return
        for each in self._batch.turn():
            self._events.append(each)
        if not (self._overlaps and self._batch.running):
            self._hand_out_events()

    def _hand_out_events(self) -> None:
        events, self._events = self._events, []
        for key, event in events:
            self._hand_out(key, event)

    def _obey(self) -> None:
        """Carry out what the inbox holds; wait a while for something where there is no sequence to go on with."""
        idle = self._batch is None or not (self._batch.running or self._batch.waiting)
        try:
            command = self._inbox.get(block=idle, timeout=_LOOK_SECONDS)
            while True:
                command()
                command = self._inbox.get_nowait()
        except Empty:
            return

    def _take(self, ticket: Ticket, works: Sequence[Work], deliver: Deliver) -> None:
        for number, (key, work) in enumerate(zip(ticket.keys, works, strict=True)):
            self._deliver[key] = (deliver, number)
            if self._batch is None:
                self._hand_out(key, UnavailableError("the engine has failed"))
                continue
            try:
                self._batch.submit(key, work)
            except EngineError as error:
                self._hand_out(key, error)
            except Exception as error:  # a fault of this sequence, not of the runtime
                self._hand_out(key, EngineError(f"the sequence cannot begin: {one_line(error)}"))

    def _drop(self, ticket: Ticket) -> None:
        for key in ticket.keys:
            if self._forget(key) is not None and self._batch is not None:
                self._batch.cancel(key)

    def _hand_out(self, key: int, event: Event) -> None:
        receiver = self._forget(key) if ends(event) else self._deliver.get(key)
        if receiver is not None:
            deliver, number = receiver
            deliver(number, event)

    def _forget(self, key: int) -> tuple[Deliver, int] | None:
        receiver = self._deliver.pop(key, None)
        if receiver is not None:
            with self._lock:
                self._taken -= 1
        return receiver

    def _let_go(self) -> None:
        """Release the runtime, before the next one is loaded or the program ends."""
        self._batch = None
        gc.collect()  # a batch and its scheduler know each other

    def _restart(self, reason: str) -> None:
        self._hand_out_events()
        self.state = "restarting" if not self.restarts else "stopped"
        self._let_go()
        self._on_failure(reason)
        for key in list(self._deliver):
            self._hand_out(key, UnavailableError("the engine has failed while it computed this request"))
        if self.state == "stopped":
            return
        self.restarts += 1
        try:
            self._open()
        except BaseException as again:
            self.state = "stopped"
            self._on_failure(one_line(again))
            return
        self.state = "ready"
