"""The variants a check compares: the shipped bundle, and what each method contributes to it."""

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.manifest import Manifest, load_manifest
from spike_export.artifacts.progress import Progress, silent
from spike_export.artifacts.recipe import Recipe
from spike_export.artifacts.results.check_document import (
    Check,
    CheckCorpus,
    CheckCost,
    CheckNoise,
    CheckReference,
    CheckText,
    CheckVariant,
)
from spike_export.calibration.corpus.corpus import Corpus
from spike_export.calibration.corpus.mixture import Mixture
from spike_export.calibration.methods.spreading import Workers
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.engines.accuracy.comparison import LoadModel, Reference, compare, compare_by, references
from spike_export.engines.accuracy.cost import check_cost
from spike_export.engines.accuracy.distances import Accuracy
from spike_export.engines.accuracy.noise_floor import NOISE_WINDOWS, noise_floor
from spike_export.engines.accuracy.reference_cache import ReferenceCache
from spike_export.engines.onnx_runtime.sequences import COMPUTED
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


@dataclass(frozen=True)
class Text:
    """A further text, of another kind than what was calibrated on.

    Attributes:
        sha256: Of the whole text.
        content: [windows, tokens] int64.
    """

    name: str
    sha256: str
    content: NDArray[np.int64]


@dataclass(frozen=True)
class _References:
    """The reference's predictions: of the windows without a prefix, behind the shipped one, and of the texts."""

    plain: Reference
    prefix: tuple[int, ...]
    behind: Reference
    texts: tuple[tuple[Text, Reference], ...]
    scratch: Path | None
    workers: Workers | None

    def of(self, prefix: tuple[int, ...]) -> Reference:
        """Return the predictions that a bundle with this prefix is compared with."""
        return self.behind if prefix == self.prefix else self.plain


@dataclass(frozen=True)
class _Evaluated:
    """A variant's row; of a shipped one the rows of the further texts and the noise floor too."""

    row: CheckVariant
    texts: tuple[CheckText, ...] = ()
    noise: CheckNoise | None = None


def check_variants(
    checkpoint: Checkpoint,
    load: LoadModel,
    corpus: Corpus | Mixture,
    content: NDArray[np.int64],
    variants: Sequence[Variant],
    options: ExportOptions,
    progress: Progress = silent,
    scratch: Path | None = None,
    texts: Sequence[Text] = (),
    cache: ReferenceCache | None = None,
    workers: Workers | None = None,
) -> Check:
    """Evaluate variants in ONNX Runtime against transformers' model on windows [windows, tokens].

    A variant that is no bundle yet is exported into a temporary folder, one at a time. Those with a bundle are the
    shipped ones and are evaluated as they are, unless ONNX Runtime's CPU kernels lack their precision; they are
    evaluated on further `texts` too, and their noise floor is measured. `scratch` is an existing folder for what is
    only needed meanwhile; the system's temporary folder by default. `cache` has what earlier checks computed of the
    reference. `workers` run the reference and the variants in this process's place; they read bundles and `scratch`
    where this process does.
    """
    runnable = options.dtype in COMPUTED and not any(_keeps_bfloat16(variant.recipe) for variant in variants)
    # Logits of a last-token bundle are all taken in memory, and what is exported for the check alone gives all.
    evaluated = replace(options, dtype=options.dtype if runnable else "float32", logits="all")
    prefix = _shipped_prefix(variants)
    wanted = [(content, ()), *[(content, prefix)] * bool(prefix), *((text.content, prefix) for text in texts)]
    shipped = sum(variant.bundle is not None for variant in variants)
    total = sum(len(windows) for windows, _ in wanted) + len(variants) * len(content)
    more = sum(len(text.content) for text in texts) + min(NOISE_WINDOWS, len(content))
    told = _counted(progress, total + shipped * more)
    with references(load, wanted, checkpoint.bos_token_id, told, scratch, cache, workers) as found:
        of_texts = tuple(zip(texts, found[len(found) - len(texts) :], strict=True))
        known = _References(found[0], prefix, found[1 if prefix else 0], of_texts, scratch, workers)
        results = [_evaluate(checkpoint, variant, evaluated, runnable, known, told) for variant in variants]
    return Check(
        corpus=_corpus(corpus.name, corpus.sha256, content),
        dtype=evaluated.dtype,
        note=None if runnable else _BFLOAT16_NOTE,
        reference=CheckReference(
            perplexity=known.plain.perplexity, behind_prefix=known.behind.perplexity if prefix else None
        ),
        variants=tuple(each.row for each in results),
        texts=tuple(text for each in results for text in each.texts),
        noise=next((each.noise for each in results if each.noise is not None), None),
    )


def _counted(progress: Progress, total: int) -> Progress:
    """Return a callback that counts the windows of all rounds, however each round counts its own."""
    done = count(1)

    def told(_what: str, _done: int, _total: int) -> None:
        progress("windows", next(done), total)

    return told


def _corpus(name: str, sha256: str, content: NDArray[np.int64]) -> CheckCorpus:
    windows_sha256 = hashlib.sha256(np.ascontiguousarray(content).tobytes()).hexdigest()
    windows, length = content.shape
    return CheckCorpus(name=name, sha256=sha256, windows=windows, length=length, windows_sha256=windows_sha256)


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
    references: _References,
    progress: Progress,
) -> _Evaluated:
    if variant.bundle is not None and runnable:
        return _measured(checkpoint, variant, load_manifest(variant.bundle), variant.bundle, references, progress)
    if variant.bundle is None:
        # Any cache will do; attention over a static one would read all of it. What is compared is not the cache.
        options = replace(options, cache=CacheOptions(), kv_cache_dtype="unquantized")
    with tempfile.TemporaryDirectory(prefix="spike-export-", dir=references.scratch) as name:
        bundle = Path(name) / "bundle"
        recipe = variant.recipe if runnable else _in_float32(variant.recipe)
        manifest = export_bundle(checkpoint, recipe, options, bundle)
        return _measured(checkpoint, variant, manifest, bundle, references, progress)


def _measured(
    checkpoint: Checkpoint,
    variant: Variant,
    manifest: Manifest,
    bundle: Path,
    references: _References,
    progress: Progress,
) -> _Evaluated:
    found = _compared(checkpoint, variant, manifest, bundle, references, progress)
    if variant.bundle is None:
        return found
    # Behind the block above, which has let its session go: memory need not hold the weights twice.
    return replace(found, noise=noise_floor(bundle, _reference(manifest, references), progress))


def _compared(
    checkpoint: Checkpoint,
    variant: Variant,
    manifest: Manifest,
    bundle: Path,
    references: _References,
    progress: Progress,
) -> _Evaluated:
    run, reference = _comparison(bundle, references.workers, progress), _reference(manifest, references)
    accuracy = run(reference)
    cost = check_cost(accuracy, reference.content, checkpoint)
    row = _row(variant, manifest, accuracy.perplexity, accuracy.perplexity / references.plain.perplexity - 1, cost)
    if variant.bundle is None:
        return _Evaluated(row)
    return _Evaluated(row, tuple(_on_text(checkpoint, *each, run(each[1])) for each in references.texts))


def _comparison(bundle: Path, workers: Workers | None, progress: Progress) -> Callable[[Reference], Accuracy]:
    """Return what runs a bundle over a reference's windows, here or in the processes of a cluster."""
    if workers is not None:
        return partial(compare_by, workers, bundle, progress=progress)
    return partial(compare, open_bundle(bundle, all_logits=True), progress=progress)


def _reference(manifest: Manifest, references: _References) -> Reference:
    return references.of(manifest.prefix.token_ids if manifest.prefix else ())


def _on_text(checkpoint: Checkpoint, text: Text, reference: Reference, accuracy: Accuracy) -> CheckText:
    return CheckText(
        corpus=_corpus(text.name, text.sha256, text.content),
        reference=reference.perplexity,
        perplexity=accuracy.perplexity,
        cost=check_cost(accuracy, text.content, checkpoint),
    )


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


def _row(variant: Variant, manifest: Manifest, perplexity: float, increase: float, cost: CheckCost) -> CheckVariant:
    counts = {precision: share.modules for precision, share in manifest.linears.items()}
    int8, fp8 = counts.pop("int8", 0), counts.pop("fp8", 0)
    return CheckVariant(
        name=variant.name,
        perplexity=perplexity,
        increase=increase,
        cost=cost,
        int8_linears=int8,
        fp8_linears=fp8,
        kept_linears=sum(counts.values()),
        head=manifest.head.format if manifest.head else None,
        prefix_length=manifest.prefix_length,
        activation_range=_range(variant.recipe, int8, fp8),
        shipped=variant.bundle is not None,
    )
