"""Sequences that come and go in a plan with a static cache: rows read their prompts alone and are stepped together."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spike_export.artifacts.errors import EngineError
from spike_export.engines.generation.slots import BLOCK, KeyValues
from spike_export.engines.tensorrt.device import Device
from spike_export.engines.tensorrt.failures import gpu_failures
from spike_export.engines.tensorrt.limits import PlanLimits
from spike_export.engines.tensorrt.prefill import PrefillCall
from spike_export.engines.tensorrt.steps import StaticSteps

PART = 512
"""Most tokens of a prompt in one call, where a plan takes more: what the other rows wait for."""


def open_slots(steps: StaticSteps, limits: PlanLimits, device: Device, rows: int) -> "PlanSlots":
    """Return `rows` rows over a plan, or as many as the plan was built for where these are fewer.

    Raises:
        EngineError: The GPU has not enough memory.
    """
    rows = min(rows, limits.largest_batch)
    # A prefill that takes fresh sequences only cannot go on behind keys and values that were restored.
    slots = (SavingPlanSlots if limits.chunked else PlanSlots)(steps, limits, device, rows)
    with device.queue():
        steps.open_rows(max(rows, limits.smallest_batch), slots.part)
    return slots


@dataclass
class PlanSlots:
    """Rows of a plan's cache.

    The sequences lie in the first places of the buffers, whichever rows they are. A step covers these places, and as
    many more as make a power of two: each batch size has an execution context and a CUDA graph of its own. In a place
    that gets no token, a step writes where the sequence's next token is written later.
    """

    steps: StaticSteps
    limits: PlanLimits
    device: Device
    rows: int
    _places: list[int] = field(default_factory=list)
    """Row that each used place belongs to."""
    _lengths: list[int] = field(default_factory=list)
    """Own tokens in each used place."""

    @property
    def context(self) -> int:
        """See `Slots`."""
        return self.limits.context

    @property
    def longest_prompt(self) -> int:
        """See `Slots`."""
        return self.limits.context if self.limits.chunked else self.limits.call

    @property
    def chunk(self) -> int | None:
        """See `Slots`."""
        return self.part if self.limits.chunked else None

    @property
    def part(self) -> int:
        """Most tokens in one call."""
        return min(PART, self.limits.call) if self.limits.chunked else self.limits.call

    def admit(self, row: int, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Slots`."""
        logits = self._read(len(self._places), 0, tokens)
        self._place(row, len(tokens))
        return logits

    def extend(self, row: int, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Slots`."""
        place = self._places.index(row)
        if not self.limits.chunked:
            raise EngineError("the plan reads a prompt in one call, because a prefix enters its static cache")
        logits = self._read(place, self._lengths[place], tokens)
        self._lengths[place] += len(tokens)
        return logits

    def step(self, rows: Sequence[int], tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Slots`."""
        places = [self._places.index(row) for row in rows]
        for place in places:
            self._require_room(self._lengths[place], 1)
        batch = self._batch(max(places) + 1)
        fed, indices = np.zeros(batch, np.int64), np.zeros(batch, np.int64)
        fed[places] = tokens
        used = min(batch, len(self._lengths))
        # A full row is stepped no more, so that what a step writes over its last token is read by nobody.
        indices[:used] = np.minimum(self._lengths[:used], self.context - 1)
        with gpu_failures():
            with self.device.queue():
                logits = self.steps.step_first(self.device.upload(fed), self.device.upload(indices))
                fetched = self.device.fetch([logits])
            of_places: NDArray[np.float32] = fetched.wait()[0]
        for place in places:
            self._lengths[place] += 1
        return of_places[places]

    def release(self, row: int, *, spoiled: bool = False) -> None:
        """See `Slots`; a place is zeroed when its next sequence begins."""
        place, last = self._places.index(row), len(self._places) - 1
        if place != last:
            with gpu_failures(), self.device.queue():
                self.steps.cache.move(last, place)
            self._places[place], self._lengths[place] = self._places[last], self._lengths[last]
        self._places.pop()
        self._lengths.pop()

    def _place(self, row: int, length: int) -> None:
        self._places.append(row)
        self._lengths.append(length)

    def _read(self, place: int, earlier: int, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        self._require_room(earlier, len(tokens))
        if len(tokens) > self.part:
            raise EngineError(
                f"{len(tokens)} tokens were given and the plan reads {self.part} in one call; give fewer, or build "
                "again with a larger --max-prompt"
            )
        with gpu_failures():
            with self.device.queue():
                fetched = self.device.fetch([self.steps.read(PrefillCall(place, tokens[None], earlier, ends=True))])
            logits: NDArray[np.float32] = fetched.wait()[0][0]
        return logits

    def _require_room(self, length: int, more: int) -> None:
        if length + more > self.context:
            raise EngineError(
                f"a row has {length} tokens, {more} more do not fit into the plan's context of {self.context}; ask for "
                "fewer, or build again with a larger --max-context"
            )

    def _batch(self, places: int) -> int:
        """Return the batch size that covers so many places."""
        rounded = 1 << (places - 1).bit_length()
        return max(self.limits.smallest_batch, min(rounded, self.rows))


@dataclass
class SavingPlanSlots(PlanSlots):
    """Rows of a plan whose prefill can go on behind tokens that are in the cache already (see `SavingSlots`)."""

    block: int = BLOCK

    def save(self, row: int, number: int) -> KeyValues:
        """See `SavingSlots`; what is saved lies in the host's memory."""
        place, prefix = self._places.index(row), self.limits.prefix
        start, stop = (prefix + edge * self.block for edge in (number, number + 1))
        with gpu_failures():
            with self.device.queue():
                parts = [own[:, start if number else 0 : stop] for own in self._buffers(place)]
                # As bytes: numpy has no bfloat16.
                fetched = self.device.fetch([torch.stack(parts).view(torch.uint8)])
            saved: NDArray[Any] = fetched.wait()[0]
        return KeyValues(saved, saved.nbytes)

    def restore(self, row: int, blocks: Sequence[KeyValues]) -> None:
        """See `SavingSlots`."""
        place, length = len(self._places), len(blocks) * self.block
        self._require_room(0, length)
        with gpu_failures(), self.device.queue():
            self.steps.cache.stage(place, fresh=True)
            saved = self.device.upload(np.concatenate([block.content for block in blocks], axis=2))
            for own, values in zip(self._buffers(place), saved, strict=True):
                own[:, : values.shape[1]].copy_(values.view(own.dtype))
        self._place(row, length)

    def _buffers(self, place: int) -> list[torch.Tensor]:
        cache = self.steps.cache
        return [cache.row(index, place) for index in range(len(cache.io.cache))]
