"""Drafts are what followed the longest run of last tokens that occurred before."""

from hypothesis import given
from hypothesis import strategies as st

from spike_export.engines.generation.prompt_lookup import LONGEST, SHORTEST, PromptLookup


def searched(tokens: list[int], most: int) -> list[int]:
    """The same by search."""
    for length in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
        for start in range(len(tokens) - length - 1, -1, -1):
            if tokens[start : start + length] == tokens[-length:]:
                whole = list(tokens)
                for index in range(most):
                    whole.append(whole[start + length + index])
                return whole[len(tokens) :]
    return []


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(0, 40), st.integers(0, 9))
def test_a_draft_is_what_a_search_finds(tokens: list[int], known: int, most: int) -> None:
    lookup = PromptLookup(tokens[:known])
    for token in tokens[known:]:
        lookup.append(token)
    assert lookup.draft(most) == searched(tokens, most)


def test_one_token_in_common_is_no_reason() -> None:
    assert PromptLookup([7, 1, 2, 3, 9, 1]).draft(4) == []
    assert PromptLookup([7, 1, 2, 3, 9, 1, 2]).draft(4) == [3, 9, 1, 2]
