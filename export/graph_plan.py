"""What a decoder's graph is to be: the recipe's part of it, and the options of the export."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.manifest import LogitsScope
from spike_export.artifacts.recipe import AttentionPlan, Dtype, HeadScheme, KvCachePlan, ModulePlan, WeightScheme
from spike_export.export.cache_options import CacheOptions

PrefixHome = Literal["cache", "attention"]
"""Where the prefix lives: in `present` from the first call on, or before it in every call's attention only."""

PrefixCache = Sequence[tuple[NDArray[np.float32], NDArray[np.float32]]]
"""Per layer (key, value), each [kv_heads, P, head_dim] float32, keys rotated; empty when there is no prefix."""


@dataclass(frozen=True)
class GraphPlan:
    """What the graph is to be.

    Attributes:
        modules: Every decoder linear → its plan.
        weights: How 8-bit weights are scaled.
        dtype: Precision of embeddings, residual stream, attention, cache and head.
        prefix: Key/values that stand before every sequence.
        prefix_in: Where the prefix lives; says nothing where there is none.
        attention: Attention block → steps of its products' operands; blocks that are not named stay as they are.
        kv_cache: Every attention block → steps of its keys and values in the cache; empty where the cache is in
            `dtype`.
        head: How the language-model head computes.
        head_scales: [hidden] Scales by which the final norm's output is divided, and the columns of a head that
            rounds its tokens multiplied; None for none.
        cache: Which cache of keys and values the graph has.
        logits: Of which tokens the graph gives logits.
    """

    modules: Mapping[str, ModulePlan]
    weights: WeightScheme
    dtype: Dtype
    prefix: PrefixCache = ()
    prefix_in: PrefixHome = "cache"
    attention: Mapping[str, AttentionPlan] = field(default_factory=dict)
    kv_cache: Mapping[str, KvCachePlan] = field(default_factory=dict)
    head: HeadScheme = "unquantized"
    head_scales: NDArray[np.float32] | None = None
    cache: CacheOptions = field(default_factory=CacheOptions)
    logits: LogitsScope = "all"

    @property
    def prefix_length(self) -> int:
        """Number of prefix tokens, P."""
        return self.prefix[0][0].shape[1] if self.prefix else 0
