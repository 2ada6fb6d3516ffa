"""How many tokens to draft: as many as pay for themselves, by what calls cost and drafts were worth so far."""

from dataclasses import dataclass, field

LENGTHS = (2, 4, 8)
"""Lengths of a draft to choose among."""

_PAST = 0.8
"""Share that the past keeps in a running mean."""

_ACCEPTED = 0.6
"""Chance of a drafted token before anything is known."""

_COST = 0.1
"""Cost of a drafted token before anything is known, in calls without a draft."""

_FIRST_REST, _LONGEST_REST = 16, 256
"""Tokens without a draft after drafts did not pay; doubled each time that a trial fails.

A failed trial costs a fraction of a call, so that at most a few percent are lost.
"""


@dataclass
class DraftLength:
    """Running means over the sequences of one runtime; pure, times come from the caller.

    Attributes:
        drafted: Tokens drafted so far.
        accepted: Tokens of drafts that were drawn.
    """

    drafted: int = 0
    accepted: int = 0
    _chance: float = _ACCEPTED
    _cost: float = _COST
    _plain: float | None = None
    """Seconds of a call without a draft."""
    _resting: int = 0
    _rest: int = field(default=_FIRST_REST)

    def choose(self) -> int:
        """Return the most tokens to draft for the next call; 0 for none."""
        if self._plain is None or self._resting > 0:  # a call without a draft first: what else is compared with
            return 0
        gains = {length: self._gain(length) for length in LENGTHS}
        best = max(gains, key=lambda length: gains[length])
        if gains[best] > 1:
            return best
        self._resting, self._rest = self._rest, min(2 * self._rest, _LONGEST_REST)
        self._chance = _ACCEPTED  # the next trial begins without prejudice
        return 0

    def _gain(self, length: int) -> float:
        """Return the expected tokens of a call per what it costs, in calls without a draft."""
        tokens = sum(self._chance**place for place in range(length + 1))
        return tokens / (1 + self._cost * length)

    def record(self, drafted: int, accepted: int, seconds: float) -> None:
        """Take what a call cost and brought.

        Args:
            drafted: Tokens of its draft.
            accepted: How many of them were drawn.
            seconds: Of the whole step.
        """
        if not drafted:
            self._plain = seconds if self._plain is None else _mean(self._plain, seconds)
            self._resting = max(0, self._resting - 1)
            return
        assert self._plain is not None, "the first call has no draft"
        self.drafted, self.accepted = self.drafted + drafted, self.accepted + accepted
        tried = min(drafted, accepted + 1)  # behind the first token that was not drawn nothing is known
        self._chance = _mean(self._chance, accepted / tried)
        self._cost = max(0.0, _mean(self._cost, (seconds / self._plain - 1) / drafted))
        if accepted == drafted:
            self._rest = _FIRST_REST


def _mean(past: float, new: float) -> float:
    return _PAST * past + (1 - _PAST) * new
