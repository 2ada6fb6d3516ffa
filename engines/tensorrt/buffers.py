"""The memory that the TensorRT runtime owns: cache, inputs, outputs and scratch, asked for before anything runs."""

from collections.abc import Mapping, Sequence
from math import prod

import torch

from spike_export.artifacts.errors import EngineError
from spike_export.engines.tensorrt.device import ALIGNMENT, Device

_GIB = 1 << 30

REMEDY = (
    "take a smaller batch or fewer tokens, export with --logits last, build with a smaller --max-batch or "
    "--max-context, or free memory on the GPU"
)


def aligned(size: int) -> int:
    """Return the next multiple of `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def tensor_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Return the size of a dense tensor."""
    return prod(shape) * dtype.itemsize


class Buffers:
    """Named pieces of device memory that stay where they are until a larger one is asked for."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._memory: dict[str, torch.Tensor] = {}

    def reserve(self, sizes: Mapping[str, int]) -> frozenset[str]:
        """Make every piece at least as large as asked for; what one held is lost where it grows.

        Args:
            sizes: Name of the piece, as told to users, → bytes.

        Returns:
            The pieces that have a new address.

        Raises:
            EngineError: There is not enough memory; all pieces are as they were, or gone where they had to grow.
        """
        grown = {name: aligned(size) for name, size in sizes.items() if size > self._size(name) or not self._size(name)}
        if not grown:
            return frozenset()
        held = sum(self._size(name) for name in grown)
        free = self._device.free_bytes() + held
        if sum(grown.values()) > free:
            raise self._exhausted(grown, free)
        for name in grown:
            self._memory.pop(name, None)
        for name, size in grown.items():
            try:
                self._memory[name] = self._device.allocate(max(size, ALIGNMENT))
            except torch.OutOfMemoryError as error:  # others use the GPU too, and memory may be in pieces
                for taken in grown:  # nobody is told that these have moved: the next call has to tell
                    self._memory.pop(taken, None)
                raise self._exhausted(grown, self._device.free_bytes()) from error
        return frozenset(grown)

    def view(self, name: str, shape: Sequence[int], dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
        """Return a part of a piece as a dense tensor; it has no values of its own.

        Args:
            name: A piece that was reserved.
            shape: Of the tensor.
            dtype: Of its elements.
            offset: In bytes, from the piece's beginning.
        """
        size = tensor_bytes(shape, dtype)
        part = self._memory[name][offset : offset + size]
        assert part.numel() == size, f"{name} was reserved with {self._size(name)} bytes, not {offset + size}"
        return part.view(dtype).view(tuple(shape))

    def address(self, name: str, offset: int = 0) -> int:
        """Return where a piece, or what lies `offset` bytes behind its beginning, is."""
        return self._memory[name].data_ptr() + offset

    def _size(self, name: str) -> int:
        return self._memory[name].numel() if name in self._memory else 0

    def _exhausted(self, grown: Mapping[str, int], free: int) -> EngineError:
        needed = sum(grown.values())
        largest = sorted(grown.items(), key=lambda item: -item[1])
        parts = ", ".join(f"{name} {_gib(size)}" for name, size in largest if size >= needed / 100)
        return EngineError(
            f"the GPU has {_gib(free)} free ({free} bytes) and {_gib(needed)} ({needed} bytes) are needed: {parts}; "
            f"{REMEDY}"
        )


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f} GiB"
