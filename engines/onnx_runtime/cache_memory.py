"""Where the buffers of a static cache lie: in host memory as arrays of numpy, on a GPU as tensors of torch.

Both kinds are sliced and assigned to in the same way; `CacheMemory` has what differs.
"""

from math import prod
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.errors import EngineError, one_line

Provider = Literal["cpu", "cuda"]
"""Where ONNX Runtime computes; caches stay there between the calls."""


class CacheMemory(Protocol):
    """Memory of a provider."""

    def zeros(self, shape: tuple[int, ...], dtype: "np.dtype[Any]") -> Any:
        """Return a buffer of zeros.

        Raises:
            EngineError: There is no room, or no such device.
        """

    def placed(self, values: NDArray[Any]) -> Any:
        """Return values of the host as a buffer assigns them."""

    def on_host(self, buffer: Any) -> NDArray[Any]:
        """Return a copy of a buffer, or of a part, in host memory."""

    def place(self, buffer: Any) -> tuple[str, int, int]:
        """Return device, its number, and the address of a buffer in one piece."""

    def synchronize(self) -> None:
        """Wait for what has been assigned: ONNX Runtime works on a stream of its own."""


class HostMemory:
    """See `CacheMemory`."""

    def zeros(self, shape: tuple[int, ...], dtype: "np.dtype[Any]") -> NDArray[Any]:
        """See `CacheMemory`.

        numpy's zeros take memory only where something is written, and large pages where the system has them: steps of
        12 rows took 7 % more processor time with small ones.
        """
        try:
            return np.zeros(shape, dtype)
        except MemoryError as error:
            raise _no_room(shape, dtype, "cpu", error) from error

    def placed(self, values: NDArray[Any]) -> NDArray[Any]:
        """See `CacheMemory`."""
        return values

    def on_host(self, buffer: NDArray[Any]) -> NDArray[Any]:
        """See `CacheMemory`."""
        return buffer.copy()

    def place(self, buffer: NDArray[Any]) -> tuple[str, int, int]:
        """See `CacheMemory`."""
        assert buffer.flags.c_contiguous, "a graph writes into one piece of memory"
        return "cpu", 0, buffer.ctypes.data

    def synchronize(self) -> None:
        """See `CacheMemory`."""


class CudaMemory:
    """See `CacheMemory`."""

    def zeros(self, shape: tuple[int, ...], dtype: "np.dtype[Any]") -> Any:
        """See `CacheMemory`."""
        import torch

        try:
            return torch.zeros(shape, dtype=getattr(torch, dtype.name), device="cuda")
        except (AssertionError, RuntimeError) as error:  # torch asserts that it was built with CUDA
            raise _no_room(shape, dtype, "cuda", error) from error

    def placed(self, values: NDArray[Any]) -> Any:
        """See `CacheMemory`."""
        import torch

        return torch.tensor(values, device="cuda")

    def on_host(self, buffer: Any) -> NDArray[Any]:
        """See `CacheMemory`."""
        values: NDArray[Any] = buffer.cpu().numpy()
        return values

    def place(self, buffer: Any) -> tuple[str, int, int]:
        """See `CacheMemory`."""
        assert buffer.is_contiguous(), "a graph writes into one piece of memory"
        return buffer.device.type, buffer.device.index or 0, buffer.data_ptr()

    def synchronize(self) -> None:
        """See `CacheMemory`."""
        import torch

        torch.cuda.synchronize()


def memory_of(provider: Provider) -> CacheMemory:
    """Return the memory that a provider computes in."""
    return HostMemory() if provider == "cpu" else CudaMemory()


def _no_room(shape: tuple[int, ...], dtype: "np.dtype[Any]", provider: Provider, error: Exception) -> EngineError:
    remedy = "" if provider == "cpu" else ", or use the provider cpu: the other one needs a torch with CUDA"
    return EngineError(
        f"there is no room for {prod(shape) * dtype.itemsize} bytes of the key/value cache on {provider} "
        f"({one_line(error)}); give fewer or shorter sequences{remedy}"
    )
