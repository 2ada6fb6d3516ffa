"""How many tokens of a prompt one call over a static cache reads.

Attention computes the scores of a whole call, then hides those behind each token: 1,024 tokens in four calls take five
eighths of the scores of one call. A call's scores also take memory, for each head and slot of the buffer.

Over a dynamic cache a prompt is read in one call, because some ropes rotate it by its whole length.
"""

from spike_export.artifacts.manifest import Manifest

LARGEST, LEAST = 256, 32
"""Tokens of a call: products are no faster with more than the largest, and slow with fewer than the least."""

SCORES_BYTES = 1 << 27
"""Most memory of a call's scores, float32, unless a call of `LEAST` tokens takes more."""


def prefill_chunk(manifest: Manifest) -> int:
    """Return the tokens of a call over a bundle's static cache."""
    assert manifest.cache_slots is not None, "a static cache has slots"
    scores = 4 * manifest.num_attention_heads * manifest.cache_slots
    return min(LARGEST, max(LEAST, SCORES_BYTES // scores))
