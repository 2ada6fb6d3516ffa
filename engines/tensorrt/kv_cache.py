"""The caller-owned cache of keys and values on the GPU, in both of its forms."""

from dataclasses import dataclass

import torch

from spike_export.engines.tensorrt.buffers import Buffers, aligned, tensor_bytes
from spike_export.engines.tensorrt.device import ALIGNMENT
from spike_export.engines.tensorrt.plan_io import PlanIo

CACHE, STAGED_ROW, OTHER_CACHE = "key/value cache", "one row's key/value cache", "key/value cache of the next step"


@dataclass
class StaticKvCache:
    """Buffers of fixed size, each both past and present: an engine writes them in place.

    Prefill and decode share them, and a batch of fewer rows uses the first ones, so that addresses stay.
    """

    io: PlanIo
    buffers: Buffers
    _rows: int = 0

    @property
    def rows_in_place(self) -> bool:
        """Return whether every row begins at an address that TensorRT takes."""
        return self._row_bytes % ALIGNMENT == 0

    def sizes(self, rows: int) -> dict[str, int]:
        """Return the memory needed for so many rows, in bytes."""
        sizes = {CACHE: len(self.io.cache) * self._stride(max(rows, self._rows))}
        if not self.rows_in_place:
            sizes[STAGED_ROW] = len(self.io.cache) * self._stride(1)
        return sizes

    def reserved(self, rows: int, moved: frozenset[str]) -> bool:
        """Begin a batch, once memory is reserved; return whether the buffers of earlier batches have moved."""
        changed = CACHE in moved or rows > self._rows
        self._rows = max(rows, self._rows)
        # A slot that a query does not see is multiplied by zero, which NaN survives: it may be in new memory, and in
        # what a batch has left that overflowed.
        for index in range(len(self.io.cache)):
            self._view(CACHE, index, self._rows)[:rows].zero_()
            if not self.rows_in_place:
                self._view(STAGED_ROW, index, 1).zero_()
        return changed

    def addresses(self, row: int) -> dict[str, int]:
        """Return where inputs and outputs of rows from this one on lie: in the buffers, or staged (see `settle`)."""
        name, stride, offset = CACHE, self._stride(self._rows), row * self._row_bytes
        if self._staged(row):
            name, stride, offset = STAGED_ROW, self._stride(1), 0
        addresses: dict[str, int] = {}
        for index, tensor in enumerate(self.io.cache):
            address = self.buffers.address(name, index * stride + offset)
            addresses[tensor.past] = addresses[tensor.present] = address
        return addresses

    def stage(self, row: int, *, fresh: bool) -> None:
        """Queue what a call of one row needs, where rows are not filled one after another.

        Args:
            row: Whose call comes next.
            fresh: Whether a sequence begins: the row is zeroed then, because the last one may have overflowed.
        """
        for index in range(len(self.io.cache)):
            own = self.row(index, row)
            if fresh:
                own.zero_()
            if self._staged(row):
                self._view(STAGED_ROW, index, 1)[0].copy_(own)

    def row(self, index: int, row: int) -> torch.Tensor:
        """Return a row's part of a buffer, [kv_heads, slots, head_dim]."""
        return self._view(CACHE, index, self._rows)[row]

    def move(self, source: int, target: int) -> None:
        """Queue a copy of one row over another one."""
        for index in range(len(self.io.cache)):
            self.row(index, target).copy_(self.row(index, source))

    def settle(self, row: int) -> None:
        """Queue a copy of the staged row to its place, where `addresses` gave that."""
        if self._staged(row):
            for index in range(len(self.io.cache)):
                self.row(index, row).copy_(self._view(STAGED_ROW, index, 1)[0])

    @property
    def _row_bytes(self) -> int:
        return tensor_bytes(self._shape(1), self.io.cache_dtype)

    def _staged(self, row: int) -> bool:
        return row * self._row_bytes % ALIGNMENT != 0

    def _shape(self, rows: int) -> tuple[int, ...]:
        assert self.io.slots is not None, "a static cache has slots"
        return self.io.cache_shape(rows, self.io.slots)

    def _stride(self, rows: int) -> int:
        return aligned(rows * self._row_bytes)

    def _view(self, name: str, index: int, rows: int) -> torch.Tensor:
        return self.buffers.view(name, self._shape(rows), self.io.cache_dtype, index * self._stride(rows))


@dataclass
class DynamicKvCache:
    """Two sets of buffers that take turns: what one step writes, the next one reads.

    Their size is known beforehand, so that nothing is allocated between steps; an allocation per step, each a little
    larger than the last, would leave the memory in pieces.
    """

    io: PlanIo
    buffers: Buffers
    _past: str = CACHE
    _present: str = OTHER_CACHE
    _rows: int = 0
    _length: int = 0

    def sizes(self, rows: int, slots: int) -> dict[str, int]:
        """Return the memory needed for sequences of so many slots, in bytes."""
        size = len(self.io.cache) * self._stride(rows, slots)
        return {CACHE: size, OTHER_CACHE: size}

    def begin(self, rows: int) -> None:
        """Forget all sequences."""
        self._rows, self._length = rows, 0

    @property
    def length(self) -> int:
        """Return how many slots are filled, the prefix counted."""
        return self._length

    def past_shape(self) -> tuple[int, ...]:
        """Return the shape of every input."""
        return self.io.cache_shape(self._rows, self._length)

    def addresses(self, added: int) -> dict[str, int]:
        """Return where inputs and outputs of a call that adds so many slots lie."""
        read, written = (self._stride(self._rows, slots) for slots in (self._length, self._length + added))
        addresses = {}
        for index, tensor in enumerate(self.io.cache):
            addresses[tensor.past] = self.buffers.address(self._past, index * read)
            addresses[tensor.present] = self.buffers.address(self._present, index * written)
        return addresses

    def turn(self, added: int) -> None:
        """Read next what the call has written."""
        self._past, self._present = self._present, self._past
        self._length += added

    def _stride(self, rows: int, slots: int) -> int:
        return aligned(tensor_bytes(self.io.cache_shape(rows, slots), self.io.cache_dtype))
