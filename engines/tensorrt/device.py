"""The GPU as the TensorRT runtime uses it: memory, one stream, graphs, and copies that nobody has to wait for."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from spike_export.artifacts.errors import EngineError


class Fetched(Protocol):
    """Values on their way to the host."""

    def wait(self) -> list[NDArray[Any]]:
        """Return them; waits for the device to come this far, and no further."""


class Device(Protocol):
    """What the runtime asks of a GPU; a test has one that only pretends."""

    @property
    def device(self) -> torch.device:
        """Return where tensors lie."""

    @property
    def stream(self) -> int:
        """Return the handle of the one stream on which all work is queued: what is queued later begins later."""

    def free_bytes(self) -> int:
        """Return how much memory could be allocated."""

    def allocate(self, size: int) -> torch.Tensor:
        """Return `size` bytes as [size] uint8, at an address that is a multiple of `ALIGNMENT`.

        Raises:
            torch.OutOfMemoryError: There are not as many.
        """

    def queue(self) -> AbstractContextManager[Any]:
        """Return a context in which torch puts its work on the stream."""

    def upload(self, values: NDArray[Any]) -> torch.Tensor:
        """Queue a copy to the device."""

    def fetch(self, tensors: Sequence[torch.Tensor]) -> Fetched:
        """Queue a copy to the host, of the values that the tensors have at this place of the stream."""

    def finish(self) -> None:
        """Wait until nothing is queued any more: what the queued work uses may be given back then."""

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """Return what queues again, as one CUDA graph, all that `enqueue` queues; nothing of it runs now."""


ALIGNMENT = 256
"""Bytes; TensorRT wants the address of every input, output and scratch memory to be a multiple."""


class CudaFetched:
    """See `Fetched`."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        # Copies to pageable memory would make the host wait. torch keeps what is pinned for later fetches.
        self._hosts = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
        for host, tensor in zip(self._hosts, tensors, strict=True):
            host.copy_(tensor, non_blocking=True)
        # Waiting without blocking the thread's core: a process that polls takes it from the one that launches.
        self._done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._done.record()

    def wait(self) -> list[NDArray[Any]]:
        """See `Fetched`."""
        self._done.synchronize()
        return [host.numpy() for host in self._hosts]


class CudaDevice:
    """An NVIDIA GPU through torch.

    Raises:
        EngineError: This torch has no CUDA, or there is no such GPU.
    """

    def __init__(self, index: int = 0) -> None:
        if torch.version.cuda is None:
            raise EngineError(
                f"a plan runs on an NVIDIA GPU, and this torch ({torch.__version__}) was built without CUDA; install "
                "torch with CUDA, or run the bundle, which needs no GPU"
            )
        count = torch.cuda.device_count()
        if not 0 <= index < count:
            raise EngineError(
                f"a plan runs on an NVIDIA GPU: number {index} was asked for and {count} were found; look at "
                "nvidia-smi, or run the bundle, which needs no GPU"
            )
        self._device = torch.device("cuda", index)
        # TensorRT synchronizes the whole device around each call on the default stream.
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    @property
    def device(self) -> torch.device:
        """See `Device`."""
        return self._device

    @property
    def stream(self) -> int:
        """See `Device`."""
        return int(self._stream.cuda_stream)

    def free_bytes(self) -> int:
        """See `Device`; what torch holds and does not use is free."""
        free, _ = torch.cuda.mem_get_info(self._device)
        unused = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return int(free + unused)

    def allocate(self, size: int) -> torch.Tensor:
        """See `Device`; torch allocates in blocks of 512 bytes."""
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def queue(self) -> AbstractContextManager[Any]:
        """See `Device`; the GPU is the current one in it, as TensorRT wants."""
        context: AbstractContextManager[Any] = torch.cuda.stream(self._stream)
        return context

    def upload(self, values: NDArray[Any]) -> torch.Tensor:
        """See `Device`."""
        host = torch.from_numpy(np.ascontiguousarray(values)).pin_memory()
        return host.to(self._device, non_blocking=True)

    def fetch(self, tensors: Sequence[torch.Tensor]) -> Fetched:
        """See `Device`."""
        return CudaFetched(tensors)

    def finish(self) -> None:
        """See `Device`."""
        self._stream.synchronize()

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """See `Device`."""
        graph = torch.cuda.CUDAGraph()
        # Another thread of the process may go on allocating meanwhile.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            enqueue()
        replay: Callable[[], None] = graph.replay
        return replay
