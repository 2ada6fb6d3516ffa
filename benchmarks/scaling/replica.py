"""One server in a discrete-event simulation: turns of the scheduler, whose times are those of measured calls."""

from collections import OrderedDict, deque
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import simpy


@dataclass(frozen=True)
class ServiceTimes:
    """Seconds that a server's calls take: straight lines through measured points.

    Attributes:
        prompt_token: A token of a prompt that is read.
        step: A decode step without any row.
        row: What each row adds to a step.
    """

    prompt_token: float
    step: float
    row: float

    @classmethod
    def through(cls, prefill: tuple[int, float], one: tuple[int, float], many: tuple[int, float]) -> "ServiceTimes":
        """Return the lines through a prefill (tokens, seconds) and two decode steps (rows, seconds)."""
        row = (many[1] - one[1]) / (many[0] - one[0])
        return cls(prefill[1] / prefill[0], one[1] - one[0] * row, row)


SMOLLM2 = ServiceTimes.through((256, 0.324), (1, 0.0129), (8, 0.0343))
"""SmolLM2-135M in W8A8 on two threads of an EPYC without VNNI, 256 tokens in front (docs/benchmarks.md)."""


@dataclass(frozen=True)
class Limits:
    """Settings of `spike-export serve`: rows, tokens of prompts between two steps, beginnings that are kept."""

    rows: int = 16
    budget: int = 256
    beginnings: int = 8


LIMITS = Limits()
"""16 rows, the others by default; a beginning of 256 tokens of SmolLM2 takes 12 MB of the cache of prefixes."""


@dataclass
class Request:
    """A prompt that begins with one of the common beginnings, and its answer.

    Attributes:
        beginning: Which one.
        shared: Tokens of it.
        own: Tokens of the prompt behind it.
        answer: Tokens of the answer.
        came, first, ended: When, in seconds; the last two are filled in.
    """

    beginning: int
    shared: int
    own: int
    answer: int
    came: float
    first: float = 0.0
    ended: float = 0.0
    unread: int = field(default=0, init=False)
    left: int = field(default=0, init=False)
    over: Any = field(default=None, init=False)


class Replica:
    """A server. As the scheduler of `spike-export serve`: prompts up to the budget, then one token of each row."""

    def __init__(self, clock: simpy.Environment, times: ServiceTimes, limits: Limits) -> None:
        self._clock, self._times, self._limits = clock, times, limits
        self._waiting: deque[Request] = deque()
        self._reading: deque[Request] = deque()
        self._rows: list[Request] = []
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._wake = clock.event()
        self.busy = 0.0
        self.hits = self.queries = 0
        clock.process(self._run())

    @property
    def load(self) -> int:
        """Requests that it has not finished."""
        return len(self._waiting) + len(self._reading) + len(self._rows)

    def take(self, request: Request) -> None:
        """Let a request wait for a row."""
        request.over = self._clock.event()
        self._waiting.append(request)
        if not self._wake.triggered:
            self._wake.succeed()

    def _run(self) -> Generator[Any, Any, None]:
        while True:
            if not self.load:
                self._wake = self._clock.event()
                yield self._wake
            self._admit()
            seconds = self._read() * self._times.prompt_token
            if self._rows:
                seconds += self._times.step + self._times.row * len(self._rows)
            self.busy += seconds
            yield self._clock.timeout(seconds)
            self._hand_out()

    def _admit(self) -> None:
        while self._waiting and len(self._reading) + len(self._rows) < self._limits.rows:
            request = self._waiting.popleft()
            self.queries += 1
            known = request.beginning in self._kept
            self.hits += known
            request.unread = request.own + (0 if known else request.shared)
            request.left = request.answer
            self._kept[request.beginning] = None
            self._kept.move_to_end(request.beginning)
            if len(self._kept) > self._limits.beginnings:
                self._kept.popitem(last=False)
            self._reading.append(request)

    def _read(self) -> int:
        """Read prompts in order, up to the budget; what is read whole gets a token in this turn."""
        read = 0
        while self._reading and read < self._limits.budget:
            request = self._reading[0]
            part = min(request.unread, self._limits.budget - read)
            request.unread -= part
            read += part
            if not request.unread:
                self._rows.append(self._reading.popleft())
        return read

    def _hand_out(self) -> None:
        for request in self._rows:
            request.left -= 1
            request.first = request.first or self._clock.now
            if not request.left:
                request.ended = self._clock.now
                request.over.succeed()
        self._rows = [request for request in self._rows if request.left]
