"""A distribution in logarithmic buckets: quantiles within one percent, and sums that no order can change.

Source: the mapping of DDSketch (Masson, Rim, Lee, VLDB 2019), with integer counts and no collapsing of buckets.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RELATIVE_ERROR = 0.01
"""Bound of |quantile - true quantile| / true quantile."""

_GAMMA = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)


@dataclass(frozen=True)
class QuantileSketch:
    """Counts of positive values by bucket: bucket k holds gamma**(k-1) < value <= gamma**k.

    Attributes:
        counts: Bucket → number of values; no bucket is empty.
        zeros: Number of values that are zero.
    """

    counts: Mapping[int, int]
    zeros: int = 0

    @classmethod
    def of(cls, values: NDArray[np.float32]) -> "QuantileSketch":
        """Count values >= 0 of any shape."""
        positive = values[values > 0].astype(np.float64)
        buckets, counts = np.unique(np.ceil(np.log(positive) / math.log(_GAMMA)).astype(np.int64), return_counts=True)
        pairs = zip(buckets.tolist(), counts.tolist(), strict=True)
        return cls(dict(pairs), int(values.size - positive.size))

    def __add__(self, other: "QuantileSketch") -> "QuantileSketch":
        buckets = sorted(self.counts.keys() | other.counts.keys())
        counts = {bucket: self.counts.get(bucket, 0) + other.counts.get(bucket, 0) for bucket in buckets}
        return QuantileSketch(counts, self.zeros + other.zeros)

    @property
    def count(self) -> int:
        """Number of values."""
        return self.zeros + sum(self.counts.values())

    def quantile(self, share: float) -> float:
        """Return the value that `share` of all values do not exceed (the lower one of two), within the error.

        Raises:
            ValueError: There are no values.
        """
        if not self.count:
            raise ValueError("a sketch of no values has no quantiles")
        left = math.floor(share * (self.count - 1)) - self.zeros
        if left < 0:
            return 0.0
        buckets = sorted(self.counts)
        cumulative = np.cumsum([self.counts[bucket] for bucket in buckets])
        bucket = buckets[int(np.searchsorted(cumulative, left, side="right"))]
        # The middle, relatively, of the bucket's bounds.
        return float(2 * _GAMMA**bucket / (_GAMMA + 1))
