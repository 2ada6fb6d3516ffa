"""What `check.json` says of a variant's cost, with invented figures."""

from typing import Any


def cost_document(increase: float, divergence: float, agreement: float, margin: float, **more: Any) -> dict[str, Any]:
    """Return a cost whose intervals all have one margin."""
    return {
        "increase": {"mean": increase, "margin": margin},
        "divergence": {"mean": divergence, "margin": margin},
        "quantiles": {"median": 0.01, "p90": 0.1, "p99": 0.5, "p999": 1.5, "max": 3.25},
        "probability_error": 0.03,
        "top1_agreement": {"mean": agreement, "margin": margin},
        "top5_agreement": {"mean": 0.98, "margin": margin},
        **more,
    }


def noise_document(margin: float = 0.0002) -> dict[str, Any]:
    """Return a noise floor whose intervals all have one margin."""
    means = {"increase": -0.0001, "divergence": 0.0008, "divergence_change": 0.00003, "top1_agreement": 0.99}
    return {"nudge": 1e-6, "windows": 4, **{name: {"mean": mean, "margin": margin} for name, mean in means.items()}}
