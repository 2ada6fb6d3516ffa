"""What a profile of a plan compiles to, in figures: the audit finds them, the sidecar keeps them."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProgramAudit:
    """What one profile compiles to.

    Attributes:
        targets: Compute capabilities it holds for; empty when the plan does not say.
        kernels: Launches of one call.
        layer_kernels: Kernels of each layer, from the first on; those of no layer are the rest.
        attention: Fused attention kernel → layers that use it.
        unfused_attention: Attention nodes that no fused kernel computes.
        fused: Modules that share one product, where it is more than one.
        weight_bytes: Number format → bytes of constants; empty when the plan does not say.
    """

    profile: int
    targets: tuple[str, ...]
    kernels: int
    layer_kernels: tuple[int, ...]
    attention: Mapping[str, int]
    unfused_attention: tuple[str, ...]
    fused: tuple[tuple[str, ...], ...]
    weight_bytes: Mapping[str, int]
