"""The scheduler against a model of it: every sequence gets what it would get alone, in bounded time, in its own row."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from spike_export.artifacts.errors import EngineError
from spike_export.serving.scheduling.limits import Limits
from spike_export.serving.scheduling.scheduler import Scheduler

CONTEXT = 40


def next_token(history: Sequence[int]) -> int:
    """A model whose token depends on all that it was fed, and on the order."""
    state = 7
    for token in history:
        state = (state * 31 + token) % 1009
    return state


def one_at_a_time(prompt: Sequence[int], new_tokens: int) -> list[int]:
    history = list(prompt)
    for _ in range(new_tokens):
        history.append(next_token(history))
    return history[len(prompt) :]


@dataclass
class Rows:
    """An engine that remembers what each row was fed, and refuses what no runtime could do."""

    count: int
    held: dict[int, list[int]] = field(default_factory=dict)

    def read(self, row: int, start: int, tokens: Sequence[int]) -> int:
        assert 0 <= row < self.count
        assert (row in self.held) == (start > 0), "a row begins once"
        assert len(self.held.get(row, [])) == start, "parts follow each other"
        self.held[row] = [*self.held.get(row, []), *tokens]
        assert len(self.held[row]) <= CONTEXT
        return next_token(self.held[row])


@dataclass
class Asked:
    prompt: list[int]
    new_tokens: int
    got: list[int] = field(default_factory=list)
    begun: bool = False
    turns_waited: int = 0


class Serving(RuleBasedStateMachine):
    keys = Bundle("keys")

    @initialize(
        rows=st.integers(1, 4),
        chunk=st.sampled_from([None, 1, 3, 8]),
        budget=st.integers(1, 20),
    )
    def begin(self, rows: int, chunk: int | None, budget: int) -> None:
        self.limits = Limits(rows, CONTEXT, chunk, budget)
        self.scheduler = Scheduler(self.limits)
        self.rows = Rows(rows)
        self.asked: dict[int, Asked] = {}
        self.next_key = 0

    @rule(target=keys, prompt=st.lists(st.integers(0, 99), min_size=1, max_size=CONTEXT + 5), new=st.integers(1, 12))
    def submit(self, prompt: list[int], new: int) -> object:
        key = self.next_key
        self.next_key += 1
        if len(prompt) + new - 1 > CONTEXT:
            with pytest.raises(EngineError, match="context size"):
                self.scheduler.submit(key, len(prompt), new)
            return multiple()
        self.scheduler.submit(key, len(prompt), new)
        self.asked[key] = Asked(prompt, new)
        return key

    @rule(key=consumes(keys))
    def cancel(self, key: int) -> None:
        """Whether it waits, is read, is generated or has ended."""
        asked = self.asked.pop(key, None)
        row = self.scheduler.leave(key)
        if asked is None:
            assert row is None
        elif row is not None and asked.begun:
            del self.rows.held[row]

    @rule()
    def turn(self) -> None:
        spent = parts = 0
        with_row = list(self.asked)[: self.limits.rows]  # first come, first served
        oldest = next((key for key in with_row if not self.asked[key].got), None)
        read = set()
        while (part := self.scheduler.next_part()) is not None:
            asked = self.asked[part.key]
            tokens = asked.prompt[part.start : part.stop]
            token = self.rows.read(part.row, part.start, tokens)
            asked.begun = True
            spent, parts = spent + len(tokens), parts + 1
            assert parts == 1 or spent <= self.limits.prefill_budget
            assert len(tokens) <= (self.limits.chunk or CONTEXT)
            read.add(part.key)
            if part.last:
                self.take(part.key, token, part.row)
        if oldest is not None:
            assert oldest in read, "the oldest unread prompt goes on in every turn"
        pairs = self.scheduler.decoding()
        generating = {key for key, asked in self.asked.items() if asked.got}
        assert {key for key, _ in pairs} == generating, "every sequence that is generated gets a token in every turn"
        for key, row in pairs:
            history = self.rows.held[row]
            self.take(key, self.rows.read(row, len(history), [self.asked[key].got[-1]]), row)

    def take(self, key: int, token: int, row: int) -> None:
        asked = self.asked[key]
        asked.got.append(token)
        if len(asked.got) == asked.new_tokens:
            assert asked.got == one_at_a_time(asked.prompt, asked.new_tokens)
            assert self.scheduler.leave(key) == row
            del self.asked[key], self.rows.held[row]

    @invariant()
    def rows_are_used(self) -> None:
        if hasattr(self, "scheduler"):
            running, waiting = self.scheduler.running, self.scheduler.waiting
            assert running + waiting == len(self.asked)
            assert running <= self.limits.rows

    def teardown(self) -> None:
        """Nothing is lost: whatever was asked for ends, in a bounded number of turns."""
        if not hasattr(self, "scheduler"):
            return
        turns = sum(len(asked.prompt) + asked.new_tokens for asked in self.asked.values())
        for _ in range(turns):
            self.turn()
        assert not self.asked
        assert not self.rows.held


TestServing = Serving.TestCase
TestServing.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def parts_of_a_turn(scheduler: Scheduler) -> list[tuple[int, int, int]]:
    parts = []
    while (part := scheduler.next_part()) is not None:
        parts.append((part.key, part.start, part.stop))
    scheduler.decoding()
    return parts


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    scheduler = Scheduler(Limits(rows=2, context=1000, chunk=10, prefill_budget=20))
    scheduler.submit(0, 500, 1)
    scheduler.submit(1, 8, 1)
    assert parts_of_a_turn(scheduler) == [(0, 0, 10), (1, 0, 8)]
    assert parts_of_a_turn(scheduler) == [(0, 10, 20), (0, 20, 30)]


def test_parts_end_at_the_same_places_whatever_is_at_hand() -> None:
    scheduler = Scheduler(Limits(rows=1, context=100, chunk=10, prefill_budget=10), lambda _: 14)
    scheduler.submit(0, 33, 1)
    part = scheduler.next_part()
    assert part is not None
    assert (part.reused, part.start, part.stop) == (14, 14, 20)
    scheduler.decoding()
    assert parts_of_a_turn(scheduler) == [(0, 20, 30)]


@pytest.mark.parametrize("field", ["rows", "context", "chunk", "prefill_budget"])
def test_limits_of_nothing_are_refused(field: str) -> None:
    with pytest.raises(EngineError, match=f"{field} is 0"):
        Limits(**{"rows": 1, "context": 8, "chunk": 4, "prefill_budget": 4, field: 0})
