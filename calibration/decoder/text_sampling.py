"""Tokens that the model draws itself, one at a time for many sequences, each behind a short beginning."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.progress import Progress, silent
from spike_export.calibration.decoder.layerwise import Decoder, Head

if TYPE_CHECKING:
    import torch

_UNKNOWN = -1
"""Stands for a token that is not drawn yet."""


def sampled_tokens(
    decoder: Decoder, begins: Sequence[Sequence[int]], tokens: int, seed: int, progress: Progress = silent
) -> NDArray[np.int64]:
    """Return sequences [len(begins), tokens] that begin as given and go on as the model draws, at temperature 1.

    A sequence goes on behind an end-of-sequence token: what the model writes there is text, too.

    Args:
        decoder: The model, whose layers stay in memory: each is used once per token.
        begins: First tokens of each sequence, one at least.
        tokens: Length of the result.
        seed: Of the draws.
        progress: Told after each token.
    """
    import torch

    draw, config = np.random.default_rng(seed), decoder.config
    found = np.full((len(begins), tokens), _UNKNOWN, np.int64)
    for row, begin in zip(found, begins, strict=True):
        row[: len(begin)] = begin
    caches = [_Cache(tokens, config.layer_window(index)) for index in range(config.num_hidden_layers)]
    with torch.inference_mode():
        head = decoder.head()
        for place in range(1, tokens):
            drawn = _drawn(_next_logits(decoder, head, found[:, place - 1 : place], place - 1, caches), draw)
            found[:, place] = np.where(found[:, place] == _UNKNOWN, drawn, found[:, place])
            progress("tokens", place + 1, tokens)
    return found


def cache_bytes(decoder: Decoder, tokens: int) -> int:
    """Return the size of one sequence's keys and values."""
    import torch

    config = decoder.config
    size = getattr(torch, decoder.execution.dtype).itemsize
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * tokens * int(size)


class _Cache:
    """Keys and values of one layer, written in place; stands where attention expects those of a prefix.

    Args:
        room: Most tokens.
        window: How many of the last ones a token sees, or None for all.
    """

    def __init__(self, room: int, window: int | None) -> None:
        self._room, self._window, self._length = room, window, 0
        self._states: tuple[torch.Tensor, ...] = ()

    def before(self, key: "torch.Tensor", value: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        """Append a token's keys and values [sequences, kv_heads, 1, head_dim]; return what the token sees."""
        new = (key, value)
        if not self._states:
            self._states = tuple(each.new_empty((*each.shape[:2], self._room, each.shape[3])) for each in new)
        start, self._length = self._length, self._length + key.shape[2]
        for states, each in zip(self._states, new, strict=True):
            states[:, :, start : self._length] = each
        first = 0 if self._window is None else max(0, self._length - self._window)
        return self._states[0][:, :, first : self._length], self._states[1][:, :, first : self._length]


def _next_logits(
    decoder: Decoder, head: Head, fed: NDArray[np.int64], past: int, caches: Sequence[_Cache]
) -> "torch.Tensor":
    """Feed one token of each sequence [sequences, 1] behind `past` others; return its logits [sequences, vocab]."""
    states, device = decoder.embedded(fed), decoder.execution.devices[0]
    for index, context in enumerate(decoder.contexts(1, past)):
        told = replace(context, mask=None).to(device)  # what is not seen is not in the cache
        with decoder.layer(index) as layer:
            states = layer(states, replace(told, past=cast("Any", caches[index])))
    return head.logits(states[:, -1]).float()


def _drawn(logits: "torch.Tensor", draw: np.random.Generator) -> NDArray[np.int64]:
    """Draw a token for each row of logits [sequences, vocab]: the largest after Gumbel noise is added."""
    noise = draw.gumbel(size=tuple(logits.shape))
    return np.asarray((logits.cpu().double().numpy() + noise).argmax(-1), np.int64)
