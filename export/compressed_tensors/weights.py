"""The tensors of the checkpoint: INT8 weights with their scales, and all others in one floating-point precision."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.recipe import Dtype, ModulePlan, WeightScheme
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.checkpoint.decoder_config import tensor_shapes
from spike_export.checkpoint.row_blocks import row_blocks
from spike_export.export.compressed_tensors.weight_shards import StoredTensor
from spike_export.export.graph.linear import NUMPY_TYPES, QuantizedWeight

_FLOAT32 = np.dtype(np.float32)


def stored_tensors(
    checkpoint: Checkpoint, modules: Mapping[str, ModulePlan], weights: WeightScheme, dtype: Dtype
) -> Iterator[StoredTensor]:
    """Yield the tensors in the order of the layers.

    A quantized linear has `weight` [out_features, in_features] int8, `weight_scale` [out_features, 1] (per channel) or
    [1] (per tensor) float32 and, with a static input, `input_scale` [1] float32.

    Args:
        checkpoint: The smoothed and rotated model.
        modules: Every decoder linear, INT8 or kept.
        weights: How INT8 weights are scaled.
        dtype: Of all other tensors.
    """
    for name, shape in tensor_shapes(checkpoint.config).items():
        module, _, kind = name.rpartition(".")
        plan = modules.get(module)
        if kind == "weight" and plan is not None and plan.number_format:
            yield from _quantized(checkpoint, module, plan, weights, shape)
        else:
            yield StoredTensor(name, NUMPY_TYPES[dtype], shape, partial(_floats, checkpoint, name, shape, dtype))


def _quantized(
    checkpoint: Checkpoint, module: str, plan: ModulePlan, weights: WeightScheme, shape: tuple[int, ...]
) -> Iterator[StoredTensor]:
    weight = QuantizedWeight(checkpoint, module, weights, "int8", transposed=False, column_factors=None)
    scale_shape = (shape[0], 1) if weights == "int8-per-channel" else (1,)
    yield StoredTensor(f"{module}.weight", np.dtype(np.int8), shape, partial(_integers, weight, shape))
    yield StoredTensor(f"{module}.weight_scale", _FLOAT32, scale_shape, _once(weight.scale))
    if plan.static_scale is not None:
        yield StoredTensor(f"{module}.input_scale", _FLOAT32, (1,), _once(partial(np.float32, plan.static_scale)))


def _integers(weight: QuantizedWeight, shape: tuple[int, ...]) -> Iterator[NDArray[Any]]:
    out = np.empty(shape, np.int8)
    weight.fill(out)
    yield out


def _once(make: Callable[[], Any]) -> Callable[[], Iterator[NDArray[Any]]]:
    def blocks() -> Iterator[NDArray[Any]]:
        yield np.asarray(make(), _FLOAT32)

    return blocks


def _floats(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], dtype: Dtype) -> Iterator[NDArray[Any]]:
    """Yield a tensor some rows at a time; a vocabulary's is never whole in memory where its source reads rows."""
    if len(shape) == 1:
        yield checkpoint.tensor(name).astype(NUMPY_TYPES[dtype])
        return
    with checkpoint.block_reader(name) as read:
        for rows in row_blocks((shape[0], shape[1])):
            block = np.empty((rows.stop - rows.start, shape[1]), NUMPY_TYPES[dtype])
            read(rows, block)
            yield block
