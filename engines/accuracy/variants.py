"""The variants a check compares: the shipped bundle, and what each method contributes to it."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.check_document import Check, CheckCorpus, CheckReference, CheckVariant
from spike_export.artifacts.manifest import Manifest, load_manifest
from spike_export.artifacts.progress import Progress, silent
from spike_export.artifacts.recipe import Recipe
from spike_export.calibration.corpus.corpus import Corpus
from spike_export.calibration.corpus.mixture import Mixture
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.engines.accuracy.comparison import Accuracy, LoadModel, ReferenceLogits, compare, reference_logits
from spike_export.engines.onnx_runtime.sequences import CACHE_TYPES
from spike_export.engines.onnx_runtime.session import open_bundle
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.cache_options import CacheOptions

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
    with reference_logits(load, content, bos, _part(progress, 0, rounds), scratch, prefix) as reference:
        results = [
            _evaluate(checkpoint, variant, evaluated, runnable, reference, _part(progress, index, rounds))
            for index, variant in enumerate(variants, start=1)
        ]
    return Check(
        corpus=CheckCorpus(name=corpus.name, sha256=corpus.sha256, windows=len(content), length=content.shape[1]),
        dtype=evaluated.dtype,
        note=None if runnable else _BFLOAT16_NOTE,
        reference=CheckReference(perplexity=reference.perplexity, behind_prefix=reference.behind_prefix),
        variants=tuple(results),
    )


def _shipped_prefix(variants: Sequence[Variant]) -> tuple[int, ...]:
    """Return the token ids of the prefix in the shipped bundle; empty without one."""
    for variant in variants:
        if variant.bundle is not None:
            prefix = load_manifest(variant.bundle).prefix
            return prefix.token_ids if prefix else ()
    return ()


def _part(progress: Progress, index: int, rounds: int) -> Progress:
    """Return a callback that counts one round of windows as a part of all rounds."""

    def told(what: str, done: int, total: int) -> None:
        progress("windows", index * total + done, rounds * total)

    return told


def _evaluate(
    checkpoint: Checkpoint,
    variant: Variant,
    options: ExportOptions,
    runnable: bool,
    reference: ReferenceLogits,
    progress: Progress,
) -> CheckVariant:
    if variant.bundle is not None and runnable:
        accuracy = compare(open_bundle(variant.bundle, all_logits=True), reference, progress)
        return _row(variant, load_manifest(variant.bundle), accuracy, reference)
    if variant.bundle is None:
        # Any cache will do; attention over a static one would read all of it.
        options = replace(options, cache=CacheOptions())
    with tempfile.TemporaryDirectory(dir=reference.folder) as name:
        bundle = Path(name) / "bundle"
        recipe = variant.recipe if runnable else _in_float32(variant.recipe)
        manifest = export_bundle(checkpoint, recipe, options, bundle)
        accuracy = compare(open_bundle(bundle), reference, progress)
    return _row(variant, manifest, accuracy, reference)


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


def _row(variant: Variant, manifest: Manifest, accuracy: Accuracy, reference: ReferenceLogits) -> CheckVariant:
    counts = {precision: share.modules for precision, share in manifest.linears.items()}
    int8, fp8 = counts.pop("int8", 0), counts.pop("fp8", 0)
    return CheckVariant(
        name=variant.name,
        perplexity=accuracy.perplexity,
        increase=accuracy.perplexity / reference.perplexity - 1,
        top1_agreement=accuracy.top1_agreement,
        kl_divergence=accuracy.kl_divergence,
        int8_linears=int8,
        fp8_linears=fp8,
        kept_linears=sum(counts.values()),
        head=manifest.head.format if manifest.head else None,
        prefix_length=manifest.prefix_length,
        activation_range=_range(variant.recipe, int8, fp8),
        shipped=variant.bundle is not None,
    )
