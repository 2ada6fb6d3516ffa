"""Decides what is computed next: pure logic, without clock, thread or engine.

Time passes in turns. In a turn waiting sequences take free rows, parts of prompts are read under a budget of tokens,
and every sequence whose prompt has been read gets one token. Nothing is evicted: a sequence that was admitted fits.

The first part of a turn is the oldest prompt's; the next one is of the prompt with the fewest tokens left, and so on
by turns. A long prompt is therefore read in a bounded number of turns, and a short one does not wait for it.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from spike_export.serving.scheduling.limits import Limits


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a prompt that is to be read: tokens `start` to `stop` of the sequence `key`, into `row`.

    Attributes:
        reused: Tokens before `start` that are to be copied into the row instead of being read; 0 for none.
        last: Whether the prompt ends here, so that the sequence gets its first token.
    """

    key: int
    row: int
    start: int
    stop: int
    reused: int
    last: bool


@dataclass(slots=True)
class _Sequence:
    key: int
    prompt_tokens: int
    row: int = -1
    read: int = 0

    @property
    def left(self) -> int:
        return self.prompt_tokens - self.read


Reusable = Callable[[int], int]
"""Key of a sequence → tokens of its prompt that are at hand and need not be read; fewer than all of them."""


class Scheduler:
    """Sequences by their keys, which are the caller's.

    A turn is: `next_part` until it gives None, each part read before the next is asked for; then `decoding` once, each
    of them stepped. `leave` takes a sequence out at any time between two calls.
    """

    def __init__(self, limits: Limits, reusable: Reusable = lambda _: 0) -> None:
        self._limits, self._reusable = limits, reusable
        self._waiting: deque[_Sequence] = deque()
        self._running: dict[int, _Sequence] = {}
        self._free = list(range(limits.rows))
        self._begin_turn()

    @property
    def waiting(self) -> int:
        """Number of sequences without a row."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of sequences with a row."""
        return len(self._running)

    def submit(self, key: int, prompt_tokens: int, new_tokens: int) -> None:
        """Let a sequence wait for a row.

        Raises:
            EngineError: The sequence does not fit into a row.
        """
        self._limits.require_room(prompt_tokens, new_tokens)
        assert key not in self._running, "a key is used once"
        self._waiting.append(_Sequence(key, prompt_tokens))

    def leave(self, key: int) -> int | None:
        """Take a sequence out, because it has ended or nobody wants it any more.

        Returns:
            The row that it had, to be released by the caller; None where it was waiting, or is not known.
        """
        sequence = self._running.pop(key, None)
        if sequence is None:
            self._waiting = deque(each for each in self._waiting if each.key != key)
            return None
        self._free.append(sequence.row)
        self._free.sort()
        return sequence.row

    def next_part(self) -> Part | None:
        """Return the next part to read in this turn; None when the budget is spent or no prompt is left to read."""
        self._admit()
        reading = [each for each in self._running.values() if each.left]
        if not reading:
            return None
        oldest_first = self._parts % 2 == 0
        sequence = reading[0] if oldest_first else min(reading, key=lambda each: each.left)
        reused = self._reuse(sequence)
        stop = self._stop(sequence)
        if self._parts and self._spent + stop - sequence.read > self._limits.prefill_budget:
            sequence.read -= reused
            return None
        part = Part(sequence.key, sequence.row, sequence.read, stop, reused, stop == sequence.prompt_tokens)
        self._parts += 1
        self._spent += stop - sequence.read
        sequence.read = stop
        return part

    def decoding(self) -> tuple[tuple[int, int], ...]:
        """Return (key, row) of the sequences that get a token in this turn; the turn ends with it."""
        self._begin_turn()
        return tuple((each.key, each.row) for each in self._running.values() if not each.left)

    def _begin_turn(self) -> None:
        self._parts = self._spent = 0

    def _admit(self) -> None:
        while self._waiting and self._free:
            sequence = self._waiting.popleft()
            sequence.row = self._free.pop(0)
            self._running[sequence.key] = sequence

    def _reuse(self, sequence: _Sequence) -> int:
        """Mark what is at hand of an unread prompt as read; return how much that is."""
        if sequence.read:
            return 0
        sequence.read = self._reusable(sequence.key)
        assert sequence.left > 0, "the last token is read for its logits"
        return sequence.read

    def _stop(self, sequence: _Sequence) -> int:
        """Return where the next part ends: at a multiple of the chunk, so that parts depend on the prompt alone."""
        chunk = self._limits.chunk
        if chunk is None:
            return sequence.prompt_tokens
        return min(sequence.prompt_tokens, (sequence.read // chunk + 1) * chunk)
