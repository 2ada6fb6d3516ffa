"""The content of `check.json`: how accurate each variant of a quantized model is, and which limits it kept."""

import json
import math
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from spike_export.artifacts.atomic_write import write_text
from spike_export.artifacts.documents import read_document
from spike_export.artifacts.errors import ArtifactError
from spike_export.artifacts.ownership import is_document


class _Part(BaseModel):
    """A part of `check.json`; keys of a newer writer are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class CheckCorpus(_Part):
    """The text that was evaluated: `windows` windows of `length` content tokens, disjoint from calibration's."""

    name: str = "unnamed"
    sha256: str | None = None
    windows: int | None = None
    length: int | None = None


class CheckReference(_Part):
    """transformers' model with nothing quantized.

    Attributes:
        behind_prefix: Its perplexity behind the shipped variant's prefix, which may differ for better or worse: what
            quantization itself costs is the distance from there. None without a prefix.
    """

    perplexity: float
    behind_prefix: float | None = None
    dtype: str = "float32"


class CheckVariant(_Part):
    """One bundle in ONNX Runtime, against the reference.

    Attributes:
        increase: Of the perplexity, as a fraction of the reference's.
        top1_agreement: Share of positions with the same most likely token, 0 to 1.
        kl_divergence: KL(reference || variant), mean over positions, in nats.
        head: Number format of its language-model head.
        activation_range: What its static activation scales cover; None when nothing is quantized.
        shipped: Whether this is the bundle's own variant.
    """

    name: str
    perplexity: float
    increase: float | None = None
    top1_agreement: float | None = None
    kl_divergence: float | None = None
    int8_linears: int | None = None
    fp8_linears: int | None = None
    kept_linears: int | None = None
    head: str | None = None
    prefix_length: int | None = None
    activation_range: str | None = None
    shipped: bool = False


class CheckGate(_Part):
    """A limit that the shipped variant had to keep."""

    name: str
    limit: float
    value: float
    passed: bool


class Check(_Part):
    """The content of `check.json`.

    Attributes:
        dtype: Precision of what is not quantized in the bundles that were evaluated.
        note: Why that is not the shipped bundle's precision; None when it is.
    """

    format: Literal[1] = 1
    corpus: CheckCorpus = CheckCorpus()
    dtype: str = "float16"
    note: str | None = None
    reference: CheckReference
    variants: tuple[CheckVariant, ...] = ()
    gates: tuple[CheckGate, ...] = ()

    @property
    def shipped(self) -> CheckVariant | None:
        """The variant that the bundle holds; None when no variant is marked."""
        return next((variant for variant in self.variants if variant.shipped), None)

    @property
    def passed(self) -> bool:
        """Whether every gate was kept."""
        return all(gate.passed for gate in self.gates)

    def gated(self, max_increase: float | None) -> "Check":
        """Return the check with the shipped variant's perplexity increase held against a limit."""
        if max_increase is None or self.shipped is None:
            return self.model_copy(update={"gates": ()})
        value = self.shipped.increase if self.shipped.increase is not None else math.inf
        gate = CheckGate(name="max-ppl-increase", limit=max_increase, value=value, passed=value <= max_increase)
        return self.model_copy(update={"gates": (gate,)})


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
    try:
        return Check.model_validate(json.loads(read_document(path)))
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"]) or "the document"
        raise ArtifactError(f"{path}: {where}: {fault['msg']}; run the check again") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: cannot read the check ({error}); run the check again") from error
