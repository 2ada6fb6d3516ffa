"""Keys and values of the beginnings of prompts, by blocks of tokens, for prompts that begin alike.

A block is known by its tokens and all tokens before it. What was used longest ago goes when the store is full; a block
is never younger than the one before it, so that no block stays without those that it needs.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from spike_export.engines.generation.slots import KeyValues


class PrefixStore:
    """Blocks in the order of their use, at most so many bytes of them."""

    def __init__(self, most_bytes: int, block: int) -> None:
        """Begin empty.

        Args:
            most_bytes: Room for keys and values.
            block: Tokens of a block.
        """
        self.block = block
        self._most_bytes, self.bytes = most_bytes, 0
        self._blocks: OrderedDict[bytes, KeyValues] = OrderedDict()

    def find(self, tokens: NDArray[np.int64]) -> list[KeyValues]:
        """Return the blocks that tokens [tokens] begin with, as many as there are."""
        names: list[bytes] = []
        for name in self._names(tokens):
            if name not in self._blocks:
                break
            names.append(name)
        self._use(names)
        return [self._blocks[name] for name in names]

    def missing(self, tokens: NDArray[np.int64]) -> list[int]:
        """Return the numbers of the blocks of tokens [tokens] that are not in the store, a part at the end left out."""
        return [number for number, name in enumerate(self._names(tokens)) if name not in self._blocks]

    def add(self, tokens: NDArray[np.int64], blocks: dict[int, KeyValues]) -> None:
        """Keep blocks of tokens [tokens] by their numbers, unless they alone are more than there is room for."""
        if sum(block.bytes for block in blocks.values()) > self._most_bytes:
            return
        names = list(self._names(tokens))
        for number, block in blocks.items():
            self._blocks[names[number]] = block
            self.bytes += block.bytes
        self._use([name for name in names if name in self._blocks])
        while self.bytes > self._most_bytes:
            _, oldest = self._blocks.popitem(last=False)
            self.bytes -= oldest.bytes

    def _use(self, names: list[bytes]) -> None:
        """Mark blocks as used now, the first of them last."""
        for name in reversed(names):
            self._blocks.move_to_end(name)

    def _names(self, tokens: NDArray[np.int64]) -> Iterator[bytes]:
        name = b""
        for end in range(self.block, len(tokens) + 1, self.block):
            name = hashlib.sha256(name + tokens[end - self.block : end].tobytes()).digest()
            yield name
