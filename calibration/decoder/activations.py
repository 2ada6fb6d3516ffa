"""The hidden states of all windows between two layers: in memory, or in a file where they are many."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

    from spike_export.artifacts.recipe import Dtype


@dataclass(frozen=True)
class Activations:
    """One tensor [batch, length, hidden] per batch.

    Attributes:
        shapes: Of the batches.
        dtype: Precision.
    """

    shapes: Sequence[tuple[int, ...]]
    dtype: "Dtype"
    _memory: "list[torch.Tensor | None]"
    _file: Any

    @classmethod
    def allocate(
        cls, shapes: Sequence[tuple[int, ...]], dtype: "Dtype", memory_limit: int, scratch: Path | None
    ) -> "Activations":
        """Make room for batches of these shapes: in memory up to `memory_limit` bytes, else in a temporary file."""
        spilled = cls._size(dtype) * sum(int(np.prod(shape)) for shape in shapes) > memory_limit
        # Unlinked at once: the file goes with the object, also after a kill.
        file = tempfile.TemporaryFile(dir=scratch) if spilled else None  # noqa: SIM115 - lives as long as the states
        return cls(shapes, dtype, [None] * len(shapes), file)

    @staticmethod
    def _size(dtype: "Dtype") -> int:
        return 4 if dtype == "float32" else 2

    def __len__(self) -> int:
        return len(self.shapes)

    @property
    def spilled(self) -> bool:
        """Whether the states are in a file."""
        return self._file is not None

    def put(self, index: int, states: "torch.Tensor") -> None:
        """Store a batch."""
        if self._file is None:
            self._memory[index] = states.detach()
            return
        self._map(index).copy_(states.detach())

    def get(self, index: int, device: str = "cpu") -> "torch.Tensor":
        """Return a batch on a device. What comes from a file is a copy."""
        if self._file is not None:
            return self._map(index).clone().to(device)
        states = self._memory[index]
        assert states is not None
        return states.to(device)

    def _map(self, index: int) -> "torch.Tensor":
        """Map one batch only, for as long as the tensor lives: a map of all would fill the resident memory."""
        import torch

        shape, size = self.shapes[index], self._size(self.dtype)
        offset = size * sum(int(np.prod(each)) for each in self.shapes[:index])
        length = offset + size * int(np.prod(shape))
        if self._file.seek(0, 2) < length:
            self._file.truncate(length)
        view = np.memmap(self._file, np.uint8, "r+", offset, (length - offset,))
        return torch.from_numpy(view).view(getattr(torch, self.dtype)).reshape(shape)
