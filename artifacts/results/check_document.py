"""The content of `check.json`: how accurate each variant of a quantized model is, and which limits it kept."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from spike_export.artifacts.files.atomic_write import write_text
from spike_export.artifacts.files.json_document import load_document
from spike_export.artifacts.ownership import is_document
from spike_export.artifacts.results.accuracy_limits import AccuracyLimits

CHECK_FORMAT: Literal[2] = 2
"""Written; the first format is read too, but for what each variant costs."""


class _Part(BaseModel):
    """A part of `check.json`; keys of a newer writer are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class CheckCorpus(_Part):
    """The text that was evaluated: `windows` windows of `length` content tokens, disjoint from calibration's.

    Attributes:
        sha256: Of the whole text.
        windows_sha256: Of the windows' tokens: two checks with the same can be compared window by window.
    """

    name: str = "unnamed"
    sha256: str | None = None
    windows: int | None = None
    length: int | None = None
    windows_sha256: str | None = None


class CheckReference(_Part):
    """transformers' model with nothing quantized.

    Attributes:
        behind_prefix: Its perplexity behind the shipped variant's prefix, which may differ for better or worse: what
            quantization itself costs is the distance from there. None without a prefix.
    """

    perplexity: float
    behind_prefix: float | None = None
    dtype: str = "float32"


class CheckInterval(_Part):
    """A mean over the evaluation windows and half the width of its 95 % interval."""

    mean: float
    margin: float

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.mean - self.margin

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.mean + self.margin


class CheckDivergence(_Part):
    """How KL(reference || variant) is distributed over the positions, in nats."""

    median: float
    p90: float
    p99: float
    p999: float
    max: float


class CheckPosition(_Part):
    """A position whose prediction is far from the reference's.

    Attributes:
        window: Of the evaluation, counted from 0.
        position: Of the predicted token in the window's content.
        divergence: KL(reference || variant), in nats.
        text: The tokens before it and, behind `→`, the predicted one; empty without a tokenizer.
    """

    window: int
    position: int
    divergence: float
    text: str = ""


class CheckPositions(_Part):
    """The cost at a range of positions in the windows: what a model has read so far changes what rounding does.

    Attributes:
        first: Position of the first predicted token, counted from 0 in the window's content.
        last: Of the last one.
        increase: Of the perplexity there, as a fraction.
        divergence: Mean, in nats.
        top1_agreement: Share of positions with the same most likely token, 0 to 1.
    """

    first: int
    last: int
    increase: float
    divergence: float
    top1_agreement: float


class CheckCost(_Part):
    """What a variant differs in from the unquantized model behind the same prefix: the cost of quantization.

    Attributes:
        increase: Of the perplexity, as a fraction; paired over the windows.
        divergence: KL(reference || variant), mean over positions, in nats.
        quantiles: The same position by position.
        probability_error: Root mean square of the difference of the probabilities that the two give the text's tokens.
        top1_agreement: Share of positions with the same most likely token, 0 to 1.
        top5_agreement: Share of positions whose most likely token of the reference is among the variant's five.
        worst: The positions with the largest divergence.
        positions: The cost by ranges of token positions.
        losses: Mean negative log-likelihood of each window under the variant, in nats.
    """

    increase: CheckInterval
    divergence: CheckInterval
    quantiles: CheckDivergence
    probability_error: float
    top1_agreement: CheckInterval
    top5_agreement: CheckInterval
    worst: tuple[CheckPosition, ...] = ()
    positions: tuple[CheckPositions, ...] = ()
    losses: tuple[float, ...] = ()


class CheckVariant(_Part):
    """One bundle in ONNX Runtime, against the reference.

    Attributes:
        increase: Of the perplexity over the reference's without a prefix, as a fraction.
        cost: Against the reference behind the prefix that is shipped, where the variant has it; else without a prefix.
            None in a document of the first format.
        head: Number format of its language-model head.
        activation_range: What its static activation scales cover; None when nothing is quantized.
        shipped: Whether this is the bundle's own variant.
    """

    name: str
    perplexity: float
    increase: float | None = None
    cost: CheckCost | None = None
    int8_linears: int | None = None
    fp8_linears: int | None = None
    kept_linears: int | None = None
    head: str | None = None
    prefix_length: int | None = None
    activation_range: str | None = None
    shipped: bool = False

    @property
    def top1_agreement(self) -> float | None:
        """Share of positions with the reference's most likely token; None where it was not measured."""
        return None if self.cost is None else self.cost.top1_agreement.mean

    @property
    def kl_divergence(self) -> float | None:
        """KL(reference || variant), mean over positions, in nats; None where it was not measured."""
        return None if self.cost is None else self.cost.divergence.mean


class CheckText(_Part):
    """The shipped variant on a further text, of another kind than what it was calibrated on.

    Attributes:
        reference: Perplexity of the reference behind the shipped prefix.
        perplexity: Of the shipped variant.
    """

    corpus: CheckCorpus
    reference: float
    perplexity: float
    cost: CheckCost


class CheckNoise(_Part):
    """The shipped variant against itself with nudged embeddings: differences of this size between bundles mean nothing.

    Attributes:
        nudge: Relative change of each channel of the embeddings, up or down.
        windows: Evaluation windows on which it was measured.
        increase: Of the perplexity by the nudge, as a fraction.
        divergence: KL(variant || nudged variant), mean over positions, in nats.
        divergence_change: By how much the nudge changes the divergence from the reference, in nats.
        top1_agreement: Share of positions with the same most likely token, 0 to 1.
    """

    nudge: float
    windows: int
    increase: CheckInterval
    divergence: CheckInterval
    divergence_change: CheckInterval
    top1_agreement: CheckInterval


class CheckGate(_Part):
    """A limit that the shipped variant had to keep.

    Attributes:
        name: Of the option.
        value: The end of the 95 % interval that is nearer to the limit, or beyond it.
    """

    name: str
    limit: float
    value: float
    passed: bool


class Check(_Part):
    """The content of `check.json`.

    Attributes:
        dtype: Precision of what is not quantized in the bundles that were evaluated.
        note: Why that is not the shipped bundle's precision; None when it is.
        texts: The shipped variant on further texts.
        noise: What differences mean nothing; None where it was not measured.
    """

    format: Literal[1, 2] = CHECK_FORMAT
    corpus: CheckCorpus = CheckCorpus()
    dtype: str = "float16"
    note: str | None = None
    reference: CheckReference
    variants: tuple[CheckVariant, ...] = ()
    texts: tuple[CheckText, ...] = ()
    noise: CheckNoise | None = None
    gates: tuple[CheckGate, ...] = ()

    @property
    def shipped(self) -> CheckVariant | None:
        """The variant that the bundle holds; None when no variant is marked."""
        return next((variant for variant in self.variants if variant.shipped), None)

    @property
    def passed(self) -> bool:
        """Whether every gate was kept."""
        return all(gate.passed for gate in self.gates)

    def gated(self, limits: AccuracyLimits) -> "Check":
        """Return the check with the shipped variant held against limits."""
        if self.shipped is None:
            return self.model_copy(update={"gates": ()})
        gates = [*_gates(self.shipped.cost, limits)]
        for text in self.texts:
            gates += _gates(text.cost, limits, f", {text.corpus.name}")
        return self.model_copy(update={"gates": tuple(gates)})


def _gates(cost: CheckCost | None, limits: AccuracyLimits, text: str = "") -> Iterator[CheckGate]:
    """Yield a gate for each limit; what was not measured keeps none. `text` says on what, behind the option's name."""
    for name, limit, value in (
        ("max-ppl-increase", limits.max_ppl_increase, math.inf if cost is None else cost.increase.high),
        ("max-kl", limits.max_kl, math.inf if cost is None else cost.divergence.high),
    ):
        if limit is not None:
            yield CheckGate(name=name + text, limit=limit, value=value, passed=value <= limit)
    least = limits.min_agreement
    if least is not None:
        value = 0.0 if cost is None else cost.top1_agreement.low
        yield CheckGate(name="min-agreement" + text, limit=least, value=value, passed=value >= least)


def save_check(check: Check, path: Path) -> None:
    """Write `check.json` atomically."""
    write_text(path, json.dumps(check.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n")


def is_check(path: Path) -> bool:
    """Return whether a file carries the mark of a check's result."""
    return is_document(path, "format", "reference", "variants")


def load_check(path: Path) -> Check:
    """Read `check.json`.

    Raises:
        ArtifactError: The file is missing, not JSON, or not a check.
    """
    return load_document(path, Check, "run the check again")
