"""Sequences in progress over an engine's rows: a turn of the scheduler computed, drawn and turned into text."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.errors import EngineError, one_line
from spike_export.engines.generation.generated_text import Piece, Row, TokenLogprob
from spike_export.engines.generation.options import GenerationOptions
from spike_export.engines.generation.sampling import Sampler, log_softmax, most_probable, seen_tokens
from spike_export.engines.generation.slots import ApartSlots, CountingSlots, KeyValues, SavingSlots, Slots
from spike_export.serving.scheduling.limits import Limits
from spike_export.serving.scheduling.prefix_store import PrefixStore
from spike_export.serving.scheduling.scheduler import Part, Scheduler


class Constraint(Protocol):
    """What a text has to be like: knows which token may come next."""

    def allowed(self) -> NDArray[np.bool_]:
        """Return [1, vocab], the tokens that may come next.

        Raises:
            EngineError: The text cannot go on.
        """

    def take(self, token: int) -> None:
        """Go on behind a token."""


@dataclass(frozen=True, eq=False)
class Work:
    """A sequence to be generated.

    Attributes:
        prompt: [tokens] int64, at least one.
        constraint: What its text has to be like, for this sequence alone; None for any text.
        scored: Whether log-probabilities of the prompt's tokens are told too. Logits are of the last token fed only,
            so that such a prompt is read token by token, together with the steps of other sequences.
    """

    prompt: NDArray[np.int64]
    options: GenerationOptions
    constraint: Constraint | None = None
    scored: bool = False

    @property
    def read_tokens(self) -> int:
        """Tokens of the prompt that are read at once or in parts; the others are fed one by one."""
        return 1 if self.scored else len(self.prompt)


@dataclass(frozen=True)
class Scored:
    """The log-probability of a token of the prompt; the first token has none."""

    logprob: TokenLogprob


@dataclass(frozen=True)
class Reused:
    """How many tokens of a prompt were at hand; comes before the first piece."""

    tokens: int


@dataclass(frozen=True)
class Read:
    """How many tokens of a prompt are in its row; comes with each part."""

    tokens: int


Event = Reused | Read | Scored | Piece | EngineError
"""What a turn adds to a sequence: a piece, the last of which says why it ended; or why it cannot go on."""


def ends(event: Event) -> bool:
    """Return whether nothing follows an event."""
    return isinstance(event, EngineError) or (isinstance(event, Piece) and event.finish_reason is not None)


class _Sequence:
    """What a sequence holds while it is generated."""

    def __init__(self, work: Work, tokenizer: Any, vocab: int) -> None:
        self.work = work
        self.begun = self.spoiled = False
        self.fed = work.read_tokens
        self.next = -1
        self.found: Sequence[KeyValues] = ()
        self._text = Row(tokenizer, 0, work.prompt, work.options)
        self._sampler = Sampler(work.options, 1)
        self._seen = seen_tokens([work.prompt], vocab, work.options)

    def draw(self, logits: NDArray[np.float32]) -> Event:
        """Draw the next token from logits [vocab].

        Whatever fails here, sampler, grammar or tokenizer, is a fault of this sequence and not of the runtime.
        """
        if not np.isfinite(logits).all():
            self.spoiled = True
            return EngineError("the logits are not finite, an activation overflowed; export with --dtype float32")
        try:
            return self._score(logits) if self.fed < len(self.work.prompt) else self._generate(logits)
        except EngineError as error:
            return error
        except Exception as error:
            return EngineError(f"the next token cannot be drawn: {one_line(error)}")

    def _generate(self, logits: NDArray[np.float32]) -> Piece:
        constraint = self.work.constraint
        allowed = None if constraint is None else constraint.allowed()
        step = self._sampler.draw(logits[None], self._seen, allowed)
        self.next = int(step.tokens[0])
        if constraint is not None:
            constraint.take(self.next)
        return self._text.take(step)

    def _score(self, logits: NDArray[np.float32]) -> Scored:
        """Take the prompt's next token in place of one that is drawn."""
        self.next = int(self.work.prompt[self.fed])
        self.fed += 1
        logprobs = log_softmax(logits[None])
        best, values = most_probable(logprobs, self.work.options.logprobs or 0)
        top = tuple(zip(best[0].tolist(), values[0].tolist(), strict=True))
        return Scored(TokenLogprob(self.next, float(logprobs[0, self.next]), top))


class Batch:
    """Sequences by their keys, which are the caller's. Not for several threads at once."""

    def __init__(self, tokenizer: Any, vocab: int, slots: Slots, limits: Limits, prefix_bytes: int = 0) -> None:
        """Schedule sequences over free slots, within limits that the slots have room for.

        Args:
            tokenizer: Turns tokens into text.
            vocab: Size of the vocabulary.
            slots: Rows, all of them free.
            limits: What to keep to.
            prefix_bytes: Memory for keys and values of prompts, for those that begin alike.
        """
        self._tokenizer, self._vocab, self._slots = tokenizer, vocab, slots
        self._saved = None
        if prefix_bytes and isinstance(slots, SavingSlots):
            self._saved = _Saved(slots, PrefixStore(prefix_bytes, slots.block))
        self._chunk = limits.chunk or 1
        self._scheduler = Scheduler(limits, self._reusable)
        self._sequences: dict[int, _Sequence] = {}

    @property
    def running(self) -> int:
        """Number of sequences with a row."""
        return self._scheduler.running

    @property
    def waiting(self) -> int:
        """Number of sequences without one."""
        return self._scheduler.waiting

    @property
    def clipped(self) -> Mapping[str, tuple[int, int]]:
        """Activations that were clipped; see `CountingSlots`."""
        return self._slots.clipped if isinstance(self._slots, CountingSlots) else {}

    def overlap(self, call: Callable[[], None]) -> bool:
        """Let something be done while the runtime computes; return whether the runtime does so beside this thread."""
        if not isinstance(self._slots, ApartSlots):
            return False
        self._slots.meanwhile = call
        return True

    def submit(self, key: int, work: Work) -> None:
        """Let a sequence take part from the next turn on, or as soon as a row is free.

        Raises:
            EngineError: The sequence does not fit into a row.
        """
        fed_later = len(work.prompt) - work.read_tokens
        sequence = _Sequence(work, self._tokenizer, self._vocab)
        self._scheduler.submit(key, work.read_tokens, fed_later + work.options.max_new_tokens)
        self._sequences[key] = sequence

    def cancel(self, key: int) -> None:
        """Stop a sequence at once; nothing happens where it has ended."""
        if key in self._sequences:
            self._leave(key)

    def turn(self) -> Iterator[tuple[int, Event]]:
        """Compute one turn; yield what it adds to each sequence, as soon as it is known.

        Raises:
            EngineError: The runtime fails; nothing of this object is of use then.
        """
        if not self._sequences and isinstance(self._slots, ApartSlots):
            self._slots.require_alive()
        while (part := self._scheduler.next_part()) is not None:
            first = not self._sequences[part.key].begun
            logits = self._read(part)
            if first:
                yield part.key, Reused(part.reused)
            yield part.key, Read(part.stop)
            if part.last:
                yield from self._draw([part.key], logits[None])
        decoding = self._scheduler.decoding()
        if decoding:
            keys = [key for key, _ in decoding]
            tokens = np.array([self._sequences[key].next for key in keys])
            yield from self._draw(keys, self._slots.step([row for _, row in decoding], tokens))

    def _reusable(self, key: int) -> int:
        sequence = self._sequences[key]
        if self._saved is None or sequence.work.scored:
            return 0
        sequence.found = self._saved.find(sequence.work.prompt, self._chunk)
        return len(sequence.found) * self._saved.store.block

    def _read(self, part: Part) -> NDArray[np.float32]:
        sequence = self._sequences[part.key]
        tokens = sequence.work.prompt[part.start : part.stop]
        if part.reused and self._saved is not None:
            self._saved.slots.restore(part.row, sequence.found)
        read = self._slots.extend if sequence.begun or part.reused else self._slots.admit
        logits = read(part.row, tokens)
        sequence.begun, sequence.found = True, ()
        if self._saved is not None and np.isfinite(logits).all():
            self._saved.keep(part.row, sequence.work.prompt[: part.stop])
        return logits

    def _draw(self, keys: Sequence[int], logits: NDArray[np.float32]) -> list[tuple[int, Event]]:
        events = [(key, self._sequences[key].draw(own)) for key, own in zip(keys, logits, strict=True)]
        for key, event in events:
            if ends(event):
                self._leave(key)
        return events

    def _leave(self, key: int) -> None:
        sequence = self._sequences.pop(key)
        row = self._scheduler.leave(key)
        if row is not None and sequence.begun:
            self._slots.release(row, spoiled=sequence.spoiled)


@dataclass(frozen=True)
class _Saved:
    """Rows whose keys and values can be saved, and the store of those that were.

    Runtimes compute a call of one token with other kernels than a call of several, and keys and values then differ by
    more than rounding where activations are INT8. What was read as a prompt is saved, therefore, and not what was
    drawn; and what is saved never leaves a single token to be read that would have been read among others.
    """

    slots: SavingSlots
    store: PrefixStore

    def find(self, prompt: NDArray[np.int64], chunk: int) -> list[KeyValues]:
        """Return the blocks of a prompt [tokens] that are at hand and change nothing where they are used.

        Args:
            prompt: The last token is always read, for its logits.
            chunk: Parts of a prompt end at multiples of it.
        """
        found = self.store.find(prompt[:-1])
        reused = len(found) * self.store.block
        alone = reused == len(prompt) - 1 and reused % chunk
        return found[:-1] if alone else found

    def keep(self, row: int, tokens: NDArray[np.int64]) -> None:
        """Save what a row holds of its first tokens [tokens], as far as that is not in the store."""
        self.store.add(tokens, {number: self.slots.save(row, number) for number in self.store.missing(tokens)})
