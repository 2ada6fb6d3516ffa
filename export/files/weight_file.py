"""Writes a graph's weights to the one file beside it, several tensors at a time."""

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spike_export.artifacts.errors import ArtifactError
from spike_export.export.graph.graph_builder import StreamedTensor

_ALIGNMENT = 4096
"""Bytes; a page, so that a runtime maps each tensor without copying it."""

_INLINE_BYTES = 256
"""Tensors up to this size stay in the graph's own file."""

_FLUSHED_BYTES = 512 << 20
"""How much is handed to the disk at a time."""

_SMALL_BYTES = 1 << 20
"""Tensors below are written after all others."""


_EXPONENTS: Mapping[ir.DataType, tuple[type[np.unsignedinteger[Any]], int]] = {
    ir.DataType.FLOAT: (np.uint32, 0x7F800000),
    ir.DataType.FLOAT16: (np.uint16, 0x7C00),
    ir.DataType.BFLOAT16: (np.uint16, 0x7F80),
}
"""Number format → integers of its width, and the bits that are all set in NaN and infinity, and in nothing else."""

_BLOCK_BYTES = 1 << 18
"""Looked at together: a part of a core's cache."""

_Place = tuple[ir.Value, ir.TensorProtocol, int]
"""An initializer, its tensor, and the byte of the file at which it begins."""


def file_bytes(model: ir.Model) -> int:
    """Return the size of the file that `write_weights` writes, the room between tensors included."""
    return _end(_places(model))


def _places(model: ir.Model) -> list[_Place]:
    places: list[_Place] = []
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.nbytes > _INLINE_BYTES:
                places.append((value, tensor, -(-_end(places) // _ALIGNMENT) * _ALIGNMENT))
    return places


def _make_inline(model: ir.Model) -> None:
    """Make the weights that are small enough for the graph's own file, those of small models' norms, once for all.

    Raises:
        ArtifactError: A weight is not finite.
    """
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.LazyTensor) and tensor.nbytes <= _INLINE_BYTES:
                with np.errstate(over="ignore"):
                    made = tensor.numpy()
                _require_finite(tensor, np.ascontiguousarray(made).reshape(-1).view(np.uint8))
                value.const_value = ir.Tensor(made, dtype=tensor.dtype, name=tensor.name)


def _end(places: list[_Place]) -> int:
    if not places:
        return 0
    _, tensor, offset = places[-1]
    return offset + tensor.nbytes


def write_weights(model: ir.Model, path: Path, threads: int, written: Callable[[int, int], None]) -> None:
    """Write the initializers to a file, and leave references to it in their place.

    A tensor's place follows from the sizes of those before it: the bytes do not depend on who writes what when. Small
    tensors are written last: a scale is known by then, whereas a thread that asks for it while another one quantizes
    its weight can only wait.

    Args:
        model: Changed: its initializers become external tensors, but for tiny ones.
        path: The file; the graph is to be saved in the same folder.
        threads: How many tensors are made at a time; memory holds as many.
        written: Told how many tensors are written, and of how many.

    Raises:
        OSError: The file cannot be written.
        ArtifactError: A weight is not finite.
    """
    placed = _places(model)
    with path.open("wb", buffering=0) as file, _threads(threads) as pool:
        file.truncate(_end(placed))
        memory = threading.local()
        order = sorted(placed, key=lambda place: place[1].nbytes < _SMALL_BYTES)
        futures = [pool.submit(_write, file.fileno(), tensor, offset, memory) for _, tensor, offset in order]
        try:
            waiting = 0
            for done, future in enumerate(as_completed(futures), 1):
                waiting += future.result()
                written(done, len(futures))
                if waiting >= _FLUSHED_BYTES:
                    # Meanwhile the threads go on; otherwise the disk would begin when they end.
                    os.fsync(file.fileno())
                    waiting = 0
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    _make_inline(model)
    for value, tensor, offset in placed:
        value.const_value = ir.ExternalTensor(
            path.name,
            offset,
            tensor.nbytes,
            tensor.dtype,
            shape=tensor.shape,  # type: ignore[arg-type]
            name=str(value.name),
            base_dir=path.parent,
        )


@contextmanager
def _threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Yield threads in which torch computes alone: between them they take all cores, and its own would be too many."""
    import torch

    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)  # what a new thread begins with


def _write(descriptor: int, tensor: ir.TensorProtocol, offset: int, memory: threading.local) -> int:
    """Write a tensor to its place; return its size in bytes."""
    with np.errstate(over="ignore"):  # what overflows is refused
        made = _bytes(tensor, memory)
    _require_finite(tensor, made)
    content = memoryview(made)  # type: ignore[arg-type]  # mypy does not know that arrays are buffers
    if content.nbytes != tensor.nbytes:
        raise ValueError(f"tensor {tensor.name!r} has {content.nbytes} bytes, declared are {tensor.nbytes}")
    while content:
        count = os.pwrite(descriptor, content, offset)
        content, offset = content[count:], offset + count
    return tensor.nbytes


def _require_finite(tensor: ir.TensorProtocol, content: NDArray[np.uint8]) -> None:
    """Refuse a weight with a value that is not finite, or that overflows the precision it is written in.

    Raises:
        ArtifactError: Names the weight and the precision.
    """
    if tensor.dtype not in _EXPONENTS:
        return
    integer, bits = _EXPONENTS[tensor.dtype]
    for start in range(0, content.size, _BLOCK_BYTES):
        if (content[start : start + _BLOCK_BYTES].view(integer) & integer(bits)).max() == bits:
            precision = str(tensor.dtype.numpy())
            raise ArtifactError(
                f"{tensor.name}: holds NaN or infinity in {precision}; download the model again if it is damaged, or "
                "export with another --dtype if its weights are too large for this one"
            )


def _bytes(tensor: ir.TensorProtocol, memory: threading.local) -> NDArray[np.uint8]:
    """Return a tensor's bytes; what is yet to be made goes to memory of the thread's own: new pages cost clearing."""
    if not isinstance(tensor, StreamedTensor):
        return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)
    held: NDArray[np.uint8] = getattr(memory, "held", np.empty(0, np.uint8))
    if held.size < tensor.nbytes:
        memory.held = held = np.empty(tensor.nbytes, np.uint8)
    content = held[: tensor.nbytes]
    tensor.fill(content.view(tensor.dtype.numpy()).reshape(tensor.shape.numpy()))
    return content
