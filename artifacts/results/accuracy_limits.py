"""The limits that a bundle's accuracy is held against."""

from dataclasses import dataclass

from spike_export.artifacts.errors import RecipeError


@dataclass(frozen=True)
class AccuracyLimits:
    """What a bundle has to keep to; None is no limit.

    A limit is kept where the whole 95 % interval keeps it.

    Attributes:
        max_ppl_increase: Largest relative increase of the perplexity over the unquantized model behind the same prefix.
        max_kl: Largest mean divergence from that model, in nats per token.
        min_agreement: Smallest share of positions with that model's most likely token.
    """

    max_ppl_increase: float | None = None
    max_kl: float | None = None
    min_agreement: float | None = None

    def __post_init__(self) -> None:
        """Refuse a limit that is out of range or not a number."""
        for option, limit, example in (
            ("--max-ppl-increase", self.max_ppl_increase, "fraction such as 0.05"),
            ("--max-kl", self.max_kl, "divergence in nats such as 0.02"),
        ):
            if limit is not None and not limit >= 0:
                raise RecipeError(f"{option} is {limit}; expected a {example}")
        if self.min_agreement is not None and not 0 <= self.min_agreement <= 1:
            raise RecipeError(f"--min-agreement is {self.min_agreement}; expected a share such as 0.95")
