"""Which tokens a mixture's router gave to an expert in the forward under way."""

from typing import TYPE_CHECKING, Any

from spike_export.checkpoint.modules import expert_of

if TYPE_CHECKING:
    import torch


def routed_positions(layer: Any, module: str) -> "torch.Tensor | None":
    """Return the flat token positions [tokens] of a module's input rows in the forward under way.

    Args:
        layer: The decoder layer.
        module: A linear's name, inside the layer or in full; None is returned where it is no expert's.
    """
    expert = expert_of(module)
    if expert is None:
        return None
    positions: torch.Tensor = layer.feed_forward.routed[expert]
    return positions
