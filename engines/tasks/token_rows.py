"""The tokens that answer requests for likelihoods: each sequence is computed once, and alike lengths together."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """A continuation whose likelihood behind a context is asked for.

    Attributes:
        context: What the model is fed before it, at least one token.
        continuation: At least one token.
    """

    context: Tokens
    continuation: Tokens

    @property
    def fed(self) -> Tokens:
        """What the model reads: nobody asks what follows the last token."""
        return self.context + self.continuation[:-1]

    @property
    def positions(self) -> slice:
        """The tokens of `fed` that predict the continuation."""
        return slice(len(self.context) - 1, len(self.context) + len(self.continuation) - 1)


@dataclass(frozen=True)
class TokenRows:
    """Sequences to compute, and where each request is answered.

    Attributes:
        rows: The sequences, longest first.
        requests_of: Of each row, the requests that it answers.
    """

    rows: tuple[Tokens, ...]
    requests_of: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, requests: Sequence[Request]) -> "TokenRows":
        """Return the fewest rows that answer all requests.

        A sequence with which a longer one begins needs no row: no token sees what follows it. A question's choices of
        one token each are answered by the question's row alone.
        """
        longest: dict[Tokens, Tokens] = {}
        behind: Tokens = ()
        for fed in sorted({request.fed for request in requests}, reverse=True):
            # In this order a sequence stands right behind those that begin with it.
            behind = behind if behind[: len(fed)] == fed else fed
            longest[fed] = behind
        answered: dict[Tokens, list[int]] = {row: [] for row in sorted(set(longest.values()), key=len, reverse=True)}
        for index, request in enumerate(requests):
            answered[longest[request.fed]].append(index)
        return cls(tuple(answered), tuple(map(tuple, answered.values())))

    def batches(self, tokens: int) -> list[NDArray[np.int64]]:
        """Return the rows in their order, in batches [rows, longest], padded with 0 on the right.

        Args:
            tokens: Most tokens of a batch, padding included; a row that is longer has a batch of its own.
        """
        found: list[NDArray[np.int64]] = []
        start = 0
        while start < len(self.rows):
            length = len(self.rows[start])
            part = self.rows[start : start + max(1, tokens // length)]
            batch = np.zeros((len(part), length), np.int64)
            for place, row in enumerate(part):
                batch[place, : len(row)] = row
            found.append(batch)
            start += len(part)
        return found
