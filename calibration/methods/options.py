"""What to measure and how to choose: the options of a calibration."""

import math
from dataclasses import dataclass
from typing import Literal

from spike_export.artifacts.errors import RecipeError
from spike_export.artifacts.recipe import (
    ActivationKind,
    ActivationRange,
    AttentionProducts,
    Dtype,
    ExcludedWeights,
    HeadScheme,
    KvCacheDtype,
    WeightScheme,
    WindowKind,
)

MOST_SAMPLES = 100_000
"""Calibration windows; the paper takes 512."""

TransformOption = Literal["auto", "always", "never"]
"""Whether a transformation is compared with going without it, taken, or left out."""

HadamardOption = TransformOption | Literal["down_proj"]
"""The same, and whether the inputs of `down_proj` are the only ones that are compared."""

ActivationOption = Literal["auto"] | ActivationKind
"""How INT8 activations are scaled: all alike, or each input's as held-out text tells (`activation_choice`)."""


KeptWeightsOption = Literal["auto"] | ExcludedWeights
"""How excluded modules hold their weights, or that held-out text tells it (`kept_weights`)."""


@dataclass(frozen=True)
class CalibrationOptions:
    """What to measure and how to choose.

    Attributes:
        samples: Calibration windows.
        length: Tokens per window, BOS included.
        seed: Places the windows.
        windows: From where they are cut.
        weights: Scales of INT8 weights.
        activations: How INT8 activations are scaled: all alike, or each input's as is chosen.
        activation_range: What the static activation scales cover.
        excluded_weights: How excluded modules hold their weights: as is said, or as is chosen.
        attention: Operands of attention's products.
        kv_cache_dtype: How the cache holds keys and values; for INT8 their steps are measured.
        head: How the language-model head computes.
        dtype: Precision of what is not quantized.
        qfem: Whether modules may stay in 16 bit.
        qfep: Whether a prefix may be used.
        prefix_length: Most tokens of a prefix.
        smoothing: Whether scales may be moved from activations to weights.
        rotation: Whether the residual stream may be rotated: tried, always or never.
        hadamard: Whether inputs may pass a Hadamard transform at run time: those of `down_proj`, and of attention and
            feed-forward blocks, tried where smoothing is; of `down_proj` alone; all without a comparison; or none.
        value_rotation: Whether attention's value heads may be rotated: where it makes less noise, or never.
        alpha: Threshold given by the user; None to choose.
        max_fp16_modules: Number of linears to keep at most, and exactly as many as fit; None to choose.
        max_fp16_share: Largest share of the linears' multiply-accumulates that the automatic choice keeps.
        max_per_token_share: Largest share of the linears' multiply-accumulates whose inputs the automatic choice
            scales per token.
        tolerance: Relative perplexity increase that the automatic choice accepts over its goal.
    """

    samples: int = 32
    length: int = 512
    seed: int = 0
    windows: WindowKind = "packed"
    weights: WeightScheme = "int8-per-channel"
    activations: ActivationOption = "auto"
    activation_range: ActivationRange = "sample-mean"
    excluded_weights: KeptWeightsOption = "unquantized"
    attention: AttentionProducts = "unquantized"
    kv_cache_dtype: KvCacheDtype = "unquantized"
    head: HeadScheme = "unquantized"
    dtype: Dtype = "float16"
    qfem: bool = True
    qfep: bool = True
    prefix_length: int = 5
    smoothing: bool = True
    rotation: TransformOption = "never"
    hadamard: HadamardOption = "auto"
    value_rotation: Literal["auto", "never"] = "auto"
    alpha: float | None = None
    max_fp16_modules: int | None = None
    max_fp16_share: float = 0.05
    max_per_token_share: float = 0.3
    tolerance: float = 0.005

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.samples < 1:
            raise RecipeError(f"--samples is {self.samples}; at least one window is needed")
        if self.attention != "unquantized" and self.kv_cache_dtype != "unquantized":
            raise RecipeError(
                f"--attention {self.attention} and --kv-cache-dtype {self.kv_cache_dtype} both round keys and values; "
                "give one"
            )
        if self.samples > MOST_SAMPLES:
            raise RecipeError(f"--samples is {self.samples}; expected at most {MOST_SAMPLES:,} windows")
        if not 0 <= self.seed < 2**63:
            raise RecipeError(f"--seed is {self.seed}; expected 0 or more")
        if self.alpha is not None and not math.isfinite(self.alpha):
            raise RecipeError(f"--alpha is {self.alpha}; expected a finite ratio such as 20")
        if self.length < 8:
            raise RecipeError(f"--length is {self.length}; a window needs at least 8 tokens")
        if self.alpha is not None and self.max_fp16_modules is not None:
            raise RecipeError("--alpha and --max-fp16-modules both say which modules stay in 16 bit; give one")
        if self.max_fp16_modules is not None and self.max_fp16_modules < 0:
            raise RecipeError(f"--max-fp16-modules is {self.max_fp16_modules}; expected 0 or more")
        if not 0 <= self.max_fp16_share <= 1:
            raise RecipeError(f"--max-fp16-share is {self.max_fp16_share}; expected a share such as 0.05")
        if not 0 <= self.max_per_token_share <= 1:
            raise RecipeError(f"--max-per-token-share is {self.max_per_token_share}; expected a share such as 0.3")
        if not 1 <= self.prefix_length <= 5:
            raise RecipeError(f"--prefix-length is {self.prefix_length}; expected 1 to 5 tokens")
        if not 0 <= self.tolerance < 1:
            raise RecipeError(f"--tolerance is {self.tolerance}; expected a fraction such as 0.005")

    @property
    def searched_activations(self) -> ActivationKind:
        """How prefix and smoothing are searched: with constants where each input's kind is chosen behind them."""
        return "static" if self.activations == "auto" else self.activations

    @property
    def searched_kept_weights(self) -> ExcludedWeights:
        """How excluded modules hold their weights while they are chosen: in 16 bit where the form is chosen last."""
        return "unquantized" if self.excluded_weights == "auto" else self.excluded_weights

    @property
    def searches_smoothing(self) -> bool:
        """Whether scales are searched at each input: for smoothing, or for what the static scales cover."""
        wanted = self.rotation != "never" or self.hadamard == "always"
        return self.smoothing or self.activation_range == "mse" or wanted
