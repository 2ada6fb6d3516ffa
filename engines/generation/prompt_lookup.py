"""Drafts of the next tokens from the text so far: what followed the last tokens when they occurred before.

A runtime verifies a draft in one call, and keeps the part that it would have drawn itself. Source: prompt lookup
decoding (Saxena, 2023), a form of speculative decoding (arXiv 2211.17192) without a second model.
"""

from collections.abc import Sequence

LONGEST, SHORTEST = 4, 2
"""Tokens that have to agree: the longest match counts. One token alone is followed by too many others."""


class PromptLookup:
    """The tokens of one sequence, and where each short run of them was last."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """Take the next token of the sequence; the runs that end before it have a follower now."""
        end = len(self._tokens)
        for length in range(SHORTEST, min(LONGEST, end) + 1):
            self._behind[tuple(self._tokens[end - length :])] = end
        self._tokens.append(token)

    def draft(self, most: int) -> list[int]:
        """Return what followed the longest run that ends the sequence and occurred before, so many tokens.

        What followed may reach the end of the sequence: the draft then goes on with its own beginning, as a list whose
        lines begin alike does. Empty where no run occurred before.
        """
        for length in range(min(LONGEST, len(self._tokens)), SHORTEST - 1, -1):
            place = self._behind.get(tuple(self._tokens[-length:]))
            if place is not None:
                known = self._tokens[place : place + max(0, most)]
                return [known[index % len(known)] for index in range(most)] if known else []
        return []
