"""A request's events on an event loop: waits for them, and stops the request when nobody waits any more."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from spike_export.artifacts.errors import EngineError
from spike_export.engines.generation.generated_text import Piece, TokenLogprob
from spike_export.serving.scheduling.batch import Event, Read, Reused, Scored, Work
from spike_export.serving.scheduling.worker import Worker


@dataclass(frozen=True)
class Progress:
    """How far a prompt has been read.

    Attributes:
        tokens: Of the prompt.
        reused: Of them, those that were at hand and not computed.
        read: Those in the cache by now, the reused ones among them.
        seconds: Since the request was submitted.
    """

    tokens: int
    reused: int
    read: int
    seconds: float


class Answer:
    """The pieces of all sequences of a request, in the order in which they are computed.

    A context manager: whatever has not ended when the block is left is cancelled.

    Attributes:
        reused: Tokens of each sequence's prompt that were at hand and not computed; known with its first piece.
        scored: Of each sequence whose prompt is scored, the prompt's tokens from the second on; known with its first
            piece.
        begun: When the sequences were submitted, in seconds of the loop's clock.
        first: When the first piece arrived; None before.
        last: When the latest piece arrived.
    """

    def __init__(self, worker: Worker, works: Sequence[Work], timeout: float) -> None:
        """Submit the sequences; see `Worker.submit` for what it raises.

        Args:
            worker: Where they are computed.
            works: The sequences, numbered from 0.
            timeout: Seconds until the last of them must have ended.
        """
        self._worker, self._works, self._left = worker, works, len(works)
        self.reused = [0] * len(works)
        self.scored: list[list[TokenLogprob]] = [[] for _ in works]
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self.begun = self.last = self._loop.time()
        self.first: float | None = None
        self.deadline = self.begun + timeout
        self._ticket = worker.submit(works, self._deliver)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._left:
            self._worker.cancel(self._ticket)

    async def pieces(self) -> AsyncIterator[tuple[int, Piece | Progress]]:
        """Yield (number of the sequence, progress of its prompt or piece) until every sequence has ended.

        Raises:
            EngineError: A sequence cannot go on.
            TimeoutError: The time is up.
        """
        while self._left:
            async with asyncio.timeout_at(self.deadline):
                number, event = await self._events.get()
            if isinstance(event, EngineError):
                raise event
            if isinstance(event, Reused):
                self.reused[number] = event.tokens
                yield number, self._progress(number, event.tokens)
                continue
            if isinstance(event, Read):
                yield number, self._progress(number, event.tokens)
                continue
            if isinstance(event, Scored):
                self.scored[number].append(event.logprob)
                continue
            self._left -= event.finish_reason is not None
            self.last = self._loop.time()
            self.first = self.first or self.last
            yield number, event

    def _progress(self, number: int, read: int) -> Progress:
        prompt, seconds = self._works[number].prompt, self._loop.time() - self.begun
        return Progress(len(prompt), self.reused[number], read, seconds)

    def _deliver(self, number: int, event: Event) -> None:
        with suppress(RuntimeError):  # the loop has closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))
