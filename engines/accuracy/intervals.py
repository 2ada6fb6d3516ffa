"""95 % intervals of means over evaluation windows."""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over windows and half the width of its 95 % interval; the half width of one window is 0."""

    mean: float
    margin: float

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> "Interval":
        """Return the interval of independent values [windows], one of each window.

        Differences of two models on the same windows make a paired interval. Means over a window's hundreds of tokens
        are close to normal, so that Student's interval holds from a few windows on; a bootstrap's percentiles are too
        narrow for few windows.
        """
        deviation = values.std(ddof=1) if len(values) > 1 else 0.0
        return cls(float(values.mean()), float(students_t(len(values) - 1) * deviation / math.sqrt(len(values))))

    @property
    def as_increase(self) -> "Interval":
        """The same of a relative increase, where the values are differences of logarithms."""
        try:
            return Interval(math.expm1(self.mean), self.margin * math.exp(self.mean))
        except OverflowError:
            return Interval(math.inf, math.inf)


def students_t(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t.

    Up to 4 degrees of freedom from the table; beyond within 0.01 by the expansion around the normal quantile.
    Source: Abramowitz and Stegun, table 26.10 and 26.7.5.
    """
    exact = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764}
    if freedom in exact:
        return exact[freedom]
    z, v = NormalDist().inv_cdf(0.975), max(1, freedom)
    terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return float(z + sum(term / v**power for power, term in enumerate(terms, 1)))
