"""Steps of an INT8 cache: one per channel of the keys and of the values, from what calibration windows put there.

A key has channels that are several times larger than the others, in every token alike. One step for all would leave the
others a few levels; a step per channel costs nothing, because queries and attention's result take it up.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.recipe import QMAX, SMALLEST_AMAX, KvCachePlan
from spike_export.calibration.decoder.exponents import STEPS_PER_OCTAVE, encode_exponents
from spike_export.calibration.methods.context import Calibration, Transform, spread

if TYPE_CHECKING:
    import torch

WINDOWS = 8
"""Calibration windows whose keys and values are looked at."""

HEADROOM = 1.25
"""What the steps cover beyond the windows: text of another kind exceeds their maxima by up to a half, and a key that
saturates costs more than finer steps bring (docs/decisions/kv-cache.md)."""

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class CacheRanges:
    """The largest magnitudes that attention caches; `visit` records a layer.

    Attributes:
        key_amax: Attention block → forward batch → [kv_heads * head_dim], of the prefix's keys too.
        value_amax: Likewise.
    """

    key_amax: dict[str, dict[int, Floats]] = field(default_factory=dict)
    value_amax: dict[str, dict[int, Floats]] = field(default_factory=dict)

    @contextmanager
    def visit(self, index: int, layer: Any) -> "Iterator[None]":
        """Within the block, what the layer's attention reads as keys and values is recorded."""
        name, attention = f"model.layers.{index}.self_attn", layer.get_submodule("self_attn")
        keys, values = (found.setdefault(name, {}) for found in (self.key_amax, self.value_amax))

        def record(
            query: "torch.Tensor", key: "torch.Tensor", value: "torch.Tensor"
        ) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor]":
            batch = layer.batch
            keys[batch], values[batch] = _channel_amax(key), _channel_amax(value)
            return query, key, value

        attention.operands = record
        try:
            yield
        finally:
            attention.operands = None

    def plans(self) -> dict[str, KvCachePlan]:
        """Return the steps of every attention block that was visited."""
        return {
            name: KvCachePlan(key=_encoded(keys.values()), value=_encoded(self.value_amax[name].values()))
            for name, keys in self.key_amax.items()
        }


def _channel_amax(states: "torch.Tensor") -> Floats:
    """Return the abs-max [kv_heads * head_dim] of [batch, kv_heads, tokens, head_dim]."""
    amax: Floats = states.abs().amax((0, 2)).float().flatten().cpu().numpy()
    return amax


def kv_cache_plans(calibration: Calibration, transform: Transform, prefix: tuple[int, ...]) -> dict[str, KvCachePlan]:
    """Return every attention block's steps; empty where the cache is not quantized.

    Args:
        calibration: The model, the windows and the options.
        transform: What is done to the weights: values of the transformed model are cached.
        prefix: Token ids that stand before every sequence; the cache holds their keys and values too.
    """
    if calibration.options.kv_cache_dtype == "unquantized":
        return {}
    ranges = CacheRanges()
    fed = calibration.fed(spread(calibration.windows.calibration, WINDOWS), prefix)
    calibration.transformed(transform).decoder.run(fed, prefix, visits=(ranges.visit,))
    return ranges.plans()


def _encoded(amax: Iterable[Floats]) -> str:
    """Return the steps that cover the batches' maxima and some more, each the next larger 2 ** (k / 8)."""
    covered = HEADROOM * np.maximum(np.max(list(amax), axis=0), SMALLEST_AMAX) / QMAX
    exponents = np.ceil(STEPS_PER_OCTAVE * np.log2(covered.astype(np.float64)))
    return encode_exponents(np.clip(exponents, -128, 127).astype(np.int8))
