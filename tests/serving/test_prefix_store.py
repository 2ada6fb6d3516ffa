"""Saved keys and values are found by exactly the tokens that they belong to, and never take more room than they may."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from spike_export.engines.generation.slots import KeyValues
from spike_export.serving.scheduling.prefix_store import PrefixStore

BLOCK = 2


def block_of(tokens: np.ndarray, number: int) -> KeyValues:
    """Content that says which tokens it was computed from."""
    return KeyValues(tuple(tokens[: (number + 1) * BLOCK].tolist()), 10)


@settings(deadline=None, max_examples=150)
@given(
    prompts=st.lists(st.lists(st.integers(0, 2), max_size=9), min_size=1, max_size=25),
    room=st.integers(0, 90),
)
def test_what_is_found_belongs_to_the_prompt(prompts: list[list[int]], room: int) -> None:
    store = PrefixStore(room, BLOCK)
    kept: set[tuple[int, ...]] = set()
    for prompt in prompts:
        tokens = np.array(prompt, np.int64)
        found = store.find(tokens)
        for number, block in enumerate(found):
            assert block.content == tuple(prompt[: (number + 1) * BLOCK])
            assert block.content in kept
        assert store.missing(tokens) == list(range(len(found), len(prompt) // BLOCK)), "no block without its first ones"
        new = {number: block_of(tokens, number) for number in store.missing(tokens)}
        store.add(tokens, new)
        kept |= {tuple(prompt[: (number + 1) * BLOCK]) for number in new}
        assert store.bytes <= room
        if len(prompt) // BLOCK * 10 <= room:
            assert len(store.find(tokens)) == len(prompt) // BLOCK, "what was just used is there"


def test_what_was_used_longest_ago_goes() -> None:
    store = PrefixStore(40, BLOCK)
    first, second, third = (np.array(tokens, np.int64) for tokens in ([1, 1, 1, 1], [2, 2, 2, 2], [3, 3]))
    for tokens in (first, second):
        store.add(tokens, {number: block_of(tokens, number) for number in store.missing(tokens)})
    store.find(first)
    store.add(third, {0: block_of(third, 0)})
    assert [len(store.find(tokens)) for tokens in (first, second, third)] == [2, 1, 1]
