"""Keys and values in INT8: the steps of a plan, and the round trip through the cache."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.errors import RecipeError
from spike_export.artifacts.recipe import QMAX, KvCachePlan
from spike_export.calibration.decoder.exponents import decode_scales

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class CacheSteps:
    """Steps of one attention block's keys and values, each [kv_heads, 1, head_dim] float32."""

    key: Floats
    value: Floats


def cache_steps(block: str, plan: KvCachePlan, kv_heads: int, head_dim: int) -> CacheSteps:
    """Return the steps of a block's plan.

    Raises:
        RecipeError: The plan cannot be read, or is of a model of another width; names the block.
    """
    steps, channels = {}, kv_heads * head_dim
    for kind, text in (("key", plan.key), ("value", plan.value)):
        try:
            found = decode_scales(text)
        except ValueError as error:
            raise RecipeError(f"kv_cache.{block}.{kind}: {error}; calibrate again") from error
        if len(found) != channels:
            raise RecipeError(f"kv_cache.{block}.{kind}: {len(found)} steps for {channels} channels; calibrate again")
        steps[kind] = found.reshape(kv_heads, 1, head_dim)
    return CacheSteps(**steps)


def quantize_cache(states: Floats, steps: Floats) -> NDArray[np.int8]:
    """Return keys or values [..., kv_heads, tokens, head_dim] as the cache holds them (half to even, saturating)."""
    rounded: NDArray[np.int8] = np.clip(np.rint(states / steps), -QMAX - 1, QMAX).astype(np.int8)
    return rounded


def cached(states: "torch.Tensor", steps: Floats) -> "torch.Tensor":
    """Return keys or values [batch, kv_heads, tokens, head_dim] as attention reads them from the cache."""
    import torch

    step = torch.from_numpy(steps).to(states.device)
    return (states.float() / step).round_().clamp_(-QMAX - 1, QMAX).mul_(step).to(states.dtype)
