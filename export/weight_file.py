"""Writes a graph's weights to the one file beside it, several tensors at a time."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import onnx_ir as ir

_ALIGNMENT = 4096
"""Bytes; a page, so that a runtime maps each tensor without copying it."""

_INLINE_BYTES = 256
"""Tensors up to this size stay in the graph's own file."""

_SMALL_BYTES = 1 << 20
"""Tensors below are written after all others."""


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
    """
    values = [value for graph in model.graphs() for value in graph.initializers.values()]
    placed, end = [], 0
    for value in values:
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > _INLINE_BYTES:
            offset = -(-end // _ALIGNMENT) * _ALIGNMENT
            placed.append((value, tensor, offset))
            end = offset + tensor.nbytes
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(threads) as pool:
        file.truncate(end)
        order = sorted(placed, key=lambda place: place[1].nbytes < _SMALL_BYTES)
        futures = [pool.submit(_write, file.fileno(), tensor, offset) for _, tensor, offset in order]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                written(done, len(futures))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
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


def _write(descriptor: int, tensor: ir.TensorProtocol, offset: int) -> None:
    content = memoryview(np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8))
    if content.nbytes != tensor.nbytes:
        raise ValueError(f"tensor {tensor.name!r} has {content.nbytes} bytes, declared are {tensor.nbytes}")
    while content:
        count = os.pwrite(descriptor, content, offset)
        content, offset = content[count:], offset + count
