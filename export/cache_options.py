"""Which cache of keys and values a graph has, and what a static one is asked to hold."""

from dataclasses import dataclass

from spike_export.artifacts.errors import RecipeError
from spike_export.artifacts.manifest import CacheKind
from spike_export.checkpoint.decoder_config import DecoderConfig

LENGTH_DEPENDENT_ROPES = frozenset({"dynamic", "longrope"})
"""Rope types that rotate a token by more than its position."""


@dataclass(frozen=True)
class CacheOptions:
    """The cache of a graph.

    Attributes:
        kind: `dynamic` grows with every call; `static` is a buffer of the caller's, written in place.
        capacity: Tokens of its own a sequence may have in a static cache, the prefix not counted; None for a
            dynamic one.

    Raises:
        RecipeError: Kind and capacity do not go together, or the capacity holds no token.
    """

    kind: CacheKind = "dynamic"
    capacity: int | None = None

    def __post_init__(self) -> None:
        if self.kind == "static" and self.capacity is None:
            raise RecipeError("--kv-cache static needs --capacity N: the most tokens of a sequence")
        if self.kind == "dynamic" and self.capacity is not None:
            raise RecipeError(
                f"--capacity {self.capacity} needs a static cache; add --kv-cache static, or leave --capacity out"
            )
        if self.capacity is not None and self.capacity < 1:
            raise RecipeError(f"--capacity is {self.capacity}; expected at least 1 token")

    def slots(self, prefix_length: int) -> int | None:
        """Return how many slots a static cache's buffer has: the prefix and the caller's own tokens."""
        return None if self.capacity is None else prefix_length + self.capacity


def require_capacity(options: CacheOptions, config: DecoderConfig) -> None:
    """Refuse a static cache that the model cannot fill, or whose padding would change how it rotates.

    Raises:
        RecipeError: Names the capacity and the model's limit, or the rope.
    """
    if options.capacity is None:
        return
    ropes = {config.rope(kind).kind for kind in config.ropes}
    by_length = sorted(ropes & LENGTH_DEPENDENT_ROPES)
    if by_length:
        raise RecipeError(
            f"--kv-cache static: rope {by_length[0]!r} depends on the sequence length, and would count the right "
            "padding of shorter rows; use --kv-cache dynamic"
        )
    most = config.max_position_embeddings
    if options.capacity > most:
        raise RecipeError(
            f"--capacity is {options.capacity}, but the model takes {most} tokens at most; give that or less"
        )
