"""The variants a check compares: the shipped bundle, and what each method contributes to it."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.check_document import (
    Check,
    CheckCorpus,
    CheckCost,
    CheckDivergence,
    CheckInterval,
    CheckPosition,
    CheckReference,
    CheckVariant,
)
from spike_export.artifacts.manifest import Manifest, load_manifest
from spike_export.artifacts.progress import Progress, silent
from spike_export.artifacts.recipe import Recipe
from spike_export.calibration.corpus.corpus import Corpus
from spike_export.calibration.corpus.mixture import Mixture
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.engines.accuracy.comparison import LoadModel, References, compare, part_of, reference_logits
from spike_export.engines.accuracy.distances import Accuracy
from spike_export.engines.accuracy.intervals import Interval
from spike_export.engines.onnx_runtime.sequences import CACHE_TYPES
from spike_export.engines.onnx_runtime.session import open_bundle
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.cache_options import CacheOptions

_WORST = 5
"""Positions with the largest divergence that are told."""

_EXCERPT = 12
"""Tokens that are shown before each of them."""

_BFLOAT16_NOTE = "ONNX Runtime has no bfloat16 products on the CPU: checked in float32, which bfloat16 rounds."


@dataclass(frozen=True)
class Variant:
    """One way to export the model.

    Attributes:
        recipe: None leaves everything unquantized.
        bundle: Where it lies already; None exports it for the check only.
    """

    name: str
    recipe: Recipe | None
    bundle: Path | None = None


def check_variants(
    checkpoint: Checkpoint,
    load: LoadModel,
    corpus: Corpus | Mixture,
    content: NDArray[np.int64],
    variants: Sequence[Variant],
    options: ExportOptions,
    progress: Progress = silent,
    scratch: Path | None = None,
) -> Check:
    """Evaluate variants in ONNX Runtime against transformers' model on windows [windows, tokens].

    A variant that is no bundle yet is exported into a temporary folder, one at a time. Those with a bundle are the
    shipped ones and are evaluated as they are, unless ONNX Runtime's CPU kernels lack their precision. `scratch` is
    an existing folder for what is only needed meanwhile; the system's temporary folder by default.
    """
    runnable = options.dtype in CACHE_TYPES and not any(_keeps_bfloat16(variant.recipe) for variant in variants)
    rounds = len(variants) + 1
    # Logits of a last-token bundle are all taken in memory, and what is exported for the check alone gives all.
    evaluated = replace(options, dtype=options.dtype if runnable else "float32", logits="all")
    bos = checkpoint.bos_token_id
    prefix = _shipped_prefix(variants)
    prefixes = tuple(dict.fromkeys(((), prefix)))
    with reference_logits(load, content, bos, part_of(progress, 0, rounds), scratch, prefixes) as references:
        results = [
            _evaluate(checkpoint, variant, evaluated, runnable, references, part_of(progress, index, rounds))
            for index, variant in enumerate(variants, start=1)
        ]
    return Check(
        corpus=CheckCorpus(name=corpus.name, sha256=corpus.sha256, windows=len(content), length=content.shape[1]),
        dtype=evaluated.dtype,
        note=None if runnable else _BFLOAT16_NOTE,
        reference=CheckReference(
            perplexity=references[()].perplexity, behind_prefix=references[prefix].perplexity if prefix else None
        ),
        variants=tuple(results),
    )


def _shipped_prefix(variants: Sequence[Variant]) -> tuple[int, ...]:
    """Return the token ids of the prefix in the shipped bundle; empty without one."""
    for variant in variants:
        if variant.bundle is not None:
            prefix = load_manifest(variant.bundle).prefix
            return prefix.token_ids if prefix else ()
    return ()


def _evaluate(
    checkpoint: Checkpoint,
    variant: Variant,
    options: ExportOptions,
    runnable: bool,
    references: References,
    progress: Progress,
) -> CheckVariant:
    if variant.bundle is not None and runnable:
        return _row(checkpoint, variant, load_manifest(variant.bundle), variant.bundle, references, progress)
    if variant.bundle is None:
        # Any cache will do; attention over a static one would read all of it.
        options = replace(options, cache=CacheOptions())
    with tempfile.TemporaryDirectory(dir=references[()].folder.parent) as name:
        bundle = Path(name) / "bundle"
        recipe = variant.recipe if runnable else _in_float32(variant.recipe)
        manifest = export_bundle(checkpoint, recipe, options, bundle)
        return _row(checkpoint, variant, manifest, bundle, references, progress)


def _keeps_bfloat16(recipe: Recipe | None) -> bool:
    return recipe is not None and any(plan.precision == "bfloat16" for plan in recipe.modules.values())


def _in_float32(recipe: Recipe | None) -> Recipe | None:
    """Return the recipe with float32 where it keeps another precision."""
    if recipe is None:
        return None
    modules = {
        name: plan if plan.number_format else plan.model_copy(update={"precision": "float32"})
        for name, plan in recipe.modules.items()
    }
    return recipe.model_copy(update={"modules": modules})


def _range(recipe: Recipe | None, int8: int, fp8: int) -> str | None:
    """Return what the static scales cover: an FP8 one covers the maximum, whatever the recipe's INT8 ones do."""
    if recipe is None or not (int8 or fp8):
        return None
    return recipe.scheme.activation_range if int8 else "max"


def _row(
    checkpoint: Checkpoint,
    variant: Variant,
    manifest: Manifest,
    bundle: Path,
    references: References,
    progress: Progress,
) -> CheckVariant:
    prefix = manifest.prefix.token_ids if manifest.prefix else ()
    reference = references.get(prefix, references[()])
    accuracy = compare(open_bundle(bundle, all_logits=True), reference, progress)
    counts = {precision: share.modules for precision, share in manifest.linears.items()}
    int8, fp8 = counts.pop("int8", 0), counts.pop("fp8", 0)
    return CheckVariant(
        name=variant.name,
        perplexity=accuracy.perplexity,
        increase=accuracy.perplexity / references[()].perplexity - 1,
        cost=_cost(accuracy, reference.content, checkpoint),
        int8_linears=int8,
        fp8_linears=fp8,
        kept_linears=sum(counts.values()),
        head=manifest.head.format if manifest.head else None,
        prefix_length=manifest.prefix_length,
        activation_range=_range(variant.recipe, int8, fp8),
        shipped=variant.bundle is not None,
    )


def _cost(accuracy: Accuracy, content: NDArray[np.int64], checkpoint: Checkpoint) -> CheckCost:
    quantiles = (accuracy.divergence_quantile(share) for share in (0.5, 0.9, 0.99, 0.999, 1.0))
    return CheckCost(
        increase=_interval(accuracy.increase),
        divergence=_interval(accuracy.divergence),
        quantiles=CheckDivergence(**dict(zip(CheckDivergence.model_fields, quantiles, strict=True))),
        probability_error=accuracy.probability_error,
        top1_agreement=_interval(accuracy.top1_agreement),
        top5_agreement=_interval(accuracy.top5_agreement),
        worst=tuple(
            CheckPosition(
                window=window,
                position=position + 1,
                divergence=divergence,
                text=_excerpt(checkpoint, content[window], position + 1),
            )
            for window, position, divergence in accuracy.worst(_WORST)
        ),
    )


def _interval(interval: Interval) -> CheckInterval:
    return CheckInterval(mean=interval.mean, margin=interval.margin)


def _excerpt(checkpoint: Checkpoint, tokens: NDArray[np.int64], position: int) -> str:
    """Return the predicted token of a window and what stands before it."""
    if checkpoint.tokenizer is None:
        return ""
    before = tokens[max(0, position - _EXCERPT) : position]
    parts = (checkpoint.tokenizer.decode(part.tolist()) for part in (before, tokens[position : position + 1]))
    return " → ".join(str(part) for part in parts)
