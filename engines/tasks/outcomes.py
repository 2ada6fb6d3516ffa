"""What quantization does to the answers of a task, item by item: accuracy, its difference, and flips."""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

_Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True, slots=True)
class Outcomes:
    """How many items each of two models answers right: the quantized and the unquantized one.

    Attributes:
        both: Right by both.
        lost: Right by the unquantized model alone.
        gained: Right by the quantized one alone.
        neither: Wrong by both.
    """

    both: int
    lost: int
    gained: int
    neither: int

    @classmethod
    def of(cls, bundle: NDArray[np.bool_], reference: NDArray[np.bool_]) -> "Outcomes":
        """Count the outcomes of paired items [items]: whether the bundle, and whether the reference is right."""
        pairs = (bundle & reference, ~bundle & reference, bundle & ~reference, ~bundle & ~reference)
        return cls(*(int(pair.sum()) for pair in pairs))

    @property
    def items(self) -> int:
        """How many items there are."""
        return self.both + self.lost + self.gained + self.neither

    @property
    def accuracy(self) -> float:
        """Share of the items that the bundle answers right."""
        return (self.both + self.gained) / self.items

    @property
    def reference_accuracy(self) -> float:
        """Share of the items that the unquantized model answers right."""
        return (self.both + self.lost) / self.items

    @property
    def difference(self) -> float:
        """Accuracy of the bundle less that of the unquantized model."""
        return (self.gained - self.lost) / self.items

    @property
    def difference_interval(self) -> tuple[float, float]:
        """The 95 % interval of the difference, which is paired: items that both answer alike do not widen it.

        Half an item is added to each of the four counts, so that a task without flips has an interval too.
        Source: Agresti and Min, Statistics in Medicine 24 (2005), "Wald + 2".
        """
        items, lost, gained = self.items + 2, self.lost + 0.5, self.gained + 0.5
        difference = (gained - lost) / items
        margin = _Z * math.sqrt((gained + lost) / items - difference**2) / math.sqrt(items)
        return max(-1.0, difference - margin), min(1.0, difference + margin)

    @property
    def p_value(self) -> float:
        """Of McNemar's exact test, two-sided: how likely so uneven flips are where both directions are as likely.

        The flips are then a fair coin's: Binomial(lost + gained, 1/2).
        """
        flips, tail, ways = self.lost + self.gained, 0, 1
        for few in range(min(self.lost, self.gained) + 1):
            tail, ways = tail + ways, ways * (flips - few) // (few + 1)
        return min(1.0, 2 * tail / (1 << flips))

    @property
    def flips(self) -> float:
        """Share of the items that were right and are wrong, or were wrong and are right (arXiv 2407.09141)."""
        return (self.lost + self.gained) / self.items

    @property
    def flips_interval(self) -> tuple[float, float]:
        """The 95 % interval of the share of flips: Wilson's."""
        items, share, square = self.items, self.flips, _Z**2
        centre = (share + square / (2 * items)) / (1 + square / items)
        margin = _Z / (1 + square / items) * math.sqrt(share * (1 - share) / items + square / (4 * items**2))
        return max(0.0, centre - margin), min(1.0, centre + margin)
