"""The numbers by which a family scales what flows through its decoder, read from HF's configuration."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Factors:
    """Scales and bounds; the defaults are LLaMA's.

    Attributes:
        embedding: What embeddings are multiplied by.
        rounds_embedding: Whether that number is first rounded to the decoder's dtype.
        attention: What scores are multiplied by; None for 1 / sqrt(head_dim).
        residual: What a block's output is multiplied by before it is added to the residual stream.
        logits: What logits are divided by.
        attention_softcap: Bound of the scores, c * tanh(scores / c), or None.
        final_softcap: Bound of the logits, c * tanh(logits / c), or None.
    """

    embedding: float = 1.0
    rounds_embedding: bool = False
    attention: float | None = None
    residual: float = 1.0
    logits: float = 1.0
    attention_softcap: float | None = None
    final_softcap: float | None = None


def positive(hf: Mapping[str, Any], key: str) -> float:
    """Return a number of a configuration that something is multiplied by, divided by, or rooted.

    Raises:
        ValueError: It is not a finite number above 0.
    """
    value = hf[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{key} is {value!r}; expected a finite number above 0")
    return value


def _bound(hf: Mapping[str, Any], key: str) -> float | None:
    return None if hf[key] is None else positive(hf, key)


def no_factors(_: Mapping[str, Any]) -> Factors:
    """Return the factors of a family that has none."""
    return Factors()


def gemma_factors(hf: Mapping[str, Any]) -> Factors:
    """Return Gemma's: embeddings times the root of their width."""
    return Factors(embedding=hf["hidden_size"] ** 0.5, rounds_embedding=True)


def gemma2_factors(hf: Mapping[str, Any]) -> Factors:
    """Return Gemma 2's: a width of its own that scores are divided by the root of, and bounds."""
    return Factors(
        embedding=hf["hidden_size"] ** 0.5,
        rounds_embedding=True,
        attention=positive(hf, "query_pre_attn_scalar") ** -0.5,
        attention_softcap=_bound(hf, "attn_logit_softcapping"),
        final_softcap=_bound(hf, "final_logit_softcapping"),
    )


def gemma3_factors(hf: Mapping[str, Any]) -> Factors:
    """Return Gemma 3's, whose scores have no bound, whatever the configuration says."""
    return Factors(
        embedding=hf["hidden_size"] ** 0.5,
        rounds_embedding=True,
        attention=positive(hf, "query_pre_attn_scalar") ** -0.5,
        final_softcap=_bound(hf, "final_logit_softcapping"),
    )


def granite_factors(hf: Mapping[str, Any]) -> Factors:
    """Return Granite's: all are named in the configuration."""
    return Factors(
        embedding=positive(hf, "embedding_multiplier"),
        attention=positive(hf, "attention_multiplier"),
        residual=positive(hf, "residual_multiplier"),
        logits=positive(hf, "logits_scaling"),
    )
