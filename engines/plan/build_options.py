"""What a plan is built for: batch sizes, lengths, GPUs, effort."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from spike_export.artifacts.errors import EngineError
from spike_export.engines.plan.backend import BackendChoice, PlanFeature

ProfileName = Literal["prefill", "decode"]
SPLIT_PROFILES: tuple[ProfileName, ...] = ("prefill", "decode")
"""The plans of a split engine, in the order in which they are built and listed."""

HardwareCompatibility = Literal["ampere-plus", "same-compute-capability"]

DEFAULT_CONTEXT = 2048
"""Tokens; a model that can do less sets less."""

DEFAULT_OPTIMIZATION_LEVEL = 3
"""TensorRT's own."""


@dataclass(frozen=True, slots=True)
class BatchRange:
    """Sequences per call: the smallest, the one the kernels are chosen for, the largest."""

    smallest: int = 1
    typical: int = 1
    largest: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.smallest <= self.typical <= self.largest:
            raise EngineError(
                f"batch {self.smallest}, {self.typical}, {self.largest}: expected 1 <= smallest <= typical <= largest"
            )


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How to build a plan.

    Attributes:
        targets: Compute capabilities such as `SM86`; empty for the backend's default.
        profiles: Which uses the engine serves. TensorRT-RTX stores the weights once per profile.
        split: A plan for prefill and one for decode, built one after another, instead of one plan for both.
        capacity: Own tokens a static cache's buffer has room for, where that is to be less than the bundle's; None
            for the bundle's.
        max_context: Largest number of the caller's tokens in a sequence, prefix not counted; None for a static
            cache's capacity, else for the smaller of 2048 and what the model was trained for.
        typical_prompt: Tokens of a prompt the prefill kernels are chosen for; clipped to `max_prompt`.
        max_prompt: Largest number of tokens in one call; None for `max_context`.
        optimization_level: TensorRT's builder optimization level, 0 to 5; None for its default.
        refit: Weights can be replaced by others in the finished plan.
        strip_weights: Leave out of the plan all weights that can be put back into it from the bundle.
        weight_streaming: Weights may stay in host memory and come to the GPU when they are needed.
        hardware_compatible: Also run on other GPUs: all from Ampere on, or those of the same compute capability.
        version_compatible: Also run in later versions of the backend.
        timing_cache: File that keeps kernel timings between builds (`tensorrt` only); made when missing.
        ignore_memory: Build even when the estimated memory exceeds what is available.
    """

    backend: BackendChoice = "auto"
    targets: tuple[str, ...] = ()
    profiles: tuple[ProfileName, ...] = ("prefill", "decode")
    split: bool = False
    batch: BatchRange = BatchRange()
    capacity: int | None = None
    max_context: int | None = None
    typical_prompt: int = 256
    max_prompt: int | None = None
    optimization_level: int | None = None
    refit: bool = False
    strip_weights: bool = False
    weight_streaming: bool = False
    hardware_compatible: HardwareCompatibility | None = None
    version_compatible: bool = False
    timing_cache: Path | None = None
    ignore_memory: bool = False

    def __post_init__(self) -> None:
        if self.backend not in get_args(BackendChoice):
            raise EngineError(f"unknown backend {self.backend!r}; known: {', '.join(get_args(BackendChoice))}")
        if not self.profiles or len(set(self.profiles)) != len(self.profiles):
            raise EngineError(f"profiles {self.profiles}: expected prefill, decode or both, each once")
        for name in self.profiles:
            if name not in get_args(ProfileName):
                raise EngineError(f"unknown profile {name!r}; known: {', '.join(get_args(ProfileName))}")
        if self.split and len(self.profiles) < 2:
            raise EngineError(f"a split engine has a plan for prefill and one for decode, not only {self.profiles[0]}")
        if self.hardware_compatible not in (None, *get_args(HardwareCompatibility)):
            known = ", ".join(get_args(HardwareCompatibility))
            raise EngineError(f"unknown hardware compatibility {self.hardware_compatible!r}; known: {known}")
        if self.max_context is not None and self.max_context < 2:
            raise EngineError(f"max_context is {self.max_context}; expected at least 2 tokens")
        for label in ("typical_prompt", "max_prompt", "capacity"):
            value = getattr(self, label)
            if value is not None and value < 1:
                raise EngineError(f"{label} is {value}; expected at least 1 token")
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise EngineError(f"optimization_level is {self.optimization_level}; expected 0 to 5")

    @property
    def features(self) -> frozenset[PlanFeature]:
        """Return what is asked for that not every backend can do."""
        return frozenset(feature for feature in get_args(PlanFeature) if getattr(self, feature))

    @property
    def plan_profiles(self) -> tuple[tuple[ProfileName, ...], ...]:
        """Return the profiles of each plan the engine consists of."""
        return tuple((name,) for name in SPLIT_PROFILES) if self.split else (self.profiles,)
