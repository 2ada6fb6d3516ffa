"""What a plan is built for: batch sizes, lengths, GPUs, effort."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from spike_export.calibration.errors import EngineError
from spike_export.engines.plan_backend import BackendChoice

ProfileName = Literal["prefill", "decode"]

DEFAULT_CONTEXT = 2048
"""Tokens; a model that can do less sets less."""


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
        profiles: Which uses the plan serves. TensorRT-RTX stores the weights once per profile.
        max_context: Largest number of the caller's tokens in a sequence, prefix not counted; None for a static
            cache's capacity, else for the smaller of 2048 and what the model was trained for.
        typical_prompt: Tokens of a prompt the prefill kernels are chosen for; clipped to `max_prompt`.
        max_prompt: Largest number of tokens in one call; None for `max_context`.
        optimization_level: TensorRT's builder optimization level, 0 to 5; None for its default.
        timing_cache: File that keeps kernel timings between builds (`tensorrt` only); made when missing.
        ignore_memory: Build even when the estimated memory exceeds what is available.
    """

    backend: BackendChoice = "auto"
    targets: tuple[str, ...] = ()
    profiles: tuple[ProfileName, ...] = ("prefill", "decode")
    batch: BatchRange = BatchRange()
    max_context: int | None = None
    typical_prompt: int = 256
    max_prompt: int | None = None
    optimization_level: int | None = None
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
        if self.max_context is not None and self.max_context < 2:
            raise EngineError(f"max_context is {self.max_context}; expected at least 2 tokens")
        for label, value in (("typical_prompt", self.typical_prompt), ("max_prompt", self.max_prompt)):
            if value is not None and value < 1:
                raise EngineError(f"{label} is {value}; expected at least 1 token")
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise EngineError(f"optimization_level is {self.optimization_level}; expected 0 to 5")
