"""Every kind of rope in a family that has it, with sizes at which a few tokens pass the original length."""

from collections.abc import Mapping
from typing import Any

LONG_FACTORS = [2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5]
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 12, "factor": 4.0}

ROPES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "dynamic": (
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
            "max_position_embeddings": 12,
        },
    ),
    "llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 12,
            }
        },
    ),
    "yarn": (
        "qwen3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 12,
            }
        },
    ),
    "longrope": ("llama", {"rope_parameters": {**LONG, "short_factor": [1.1] * 8, "long_factor": LONG_FACTORS}}),
    "partial": (
        "phi3",
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            "sliding_window": None,
        },
    ),
    "partial longrope": (
        "phi3",
        {
            "head_dim": 16,
            "hidden_size": 64,
            # Phi-3's configuration has the original length outside of the rope's parameters.
            "original_max_position_embeddings": 12,
            "rope_parameters": {
                **LONG,
                "partial_rotary_factor": 0.5,
                "short_factor": [1.1] * 4,
                "long_factor": LONG_FACTORS[:4],
            },
            "sliding_window": None,
        },
    ),
    "one linear of two": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            "sliding_window": 64,
        },
    ),
}
"""Kind → family and changes; no window leaves a token out, so that transformers' cache can hold the prefix."""

BY_LENGTH = ("dynamic", "longrope", "partial longrope")
