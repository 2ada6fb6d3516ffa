"""The check of a bundle by itself, without the run that made it."""

from contextlib import nullcontext
from pathlib import Path

from spike_export.artifacts.files.atomic_write import require_file_name
from spike_export.artifacts.ownership import require_replaceable
from spike_export.artifacts.progress import Progress, silent
from spike_export.artifacts.results.accuracy_limits import AccuracyLimits
from spike_export.artifacts.results.check_document import Check, is_check, save_check
from spike_export.calibration.decoder.layerwise import Decoder, Execution
from spike_export.engines.accuracy.variants import Variant, check_variants
from spike_export.export.bundle import ExportOptions
from spike_export.pipeline.checking.opened_pair import opened_pair
from spike_export.pipeline.cluster.cluster_options import ClusterOptions
from spike_export.pipeline.cluster.ray_workers import RayWorkers, WorkerTask
from spike_export.pipeline.evaluation_text import EvaluationText, evaluation_windows
from spike_export.pipeline.further_texts import further_texts
from spike_export.pipeline.kept_references import reference_cache


def check(
    bundle: Path | str,
    reference: Path | str,
    text: EvaluationText = EvaluationText(),
    *,
    max_ppl_increase: float | None = None,
    max_kl: float | None = None,
    min_agreement: float | None = None,
    cluster: ClusterOptions | None = None,
    out: Path | str | None = None,
    progress: Progress = silent,
    force: bool = False,
    overwrite: bool = False,
) -> Check:
    """Compare a bundle with the model it was made of: perplexity, top-1 agreement, KL divergence.

    Args:
        bundle: Folder that `export` wrote.
        reference: HF directory, `.gguf` file or hub id of the model.
        text: The corpus, and how its evaluation windows are cut.
        max_ppl_increase: Largest relative perplexity increase over the unquantized model behind the same prefix, such
            as 0.05; `passed` of the result says whether the 95 % interval keeps to all limits.
        max_kl: Largest mean divergence, in nats per token.
        min_agreement: Smallest share of positions with the same most likely token.
        cluster: Ray cluster whose workers run the model and the bundle over the windows, and read both where this
            process does; None to do it in this process.
        out: JSON file to write the result to.
        progress: Told of the windows evaluated.
        force: Compute the unquantized model also where an earlier check of the same model, prefix and text kept its
            predictions.
        overwrite: Replace also a file at `out` that is no check's result.

    Raises:
        ArtifactError: The bundle was made of another checkpoint, or the result cannot be written.
        CheckpointError: The model cannot be read.
        CorpusError: The corpus cannot be used.
        RecipeError: A limit is out of range, or the windows are longer than the model's sequences or its static cache.
        EngineError: ONNX Runtime cannot run the bundle.
        CalibrationError: There is no such cluster, or one of its workers failed.
    """
    limits = AccuracyLimits(max_ppl_increase, max_kl, min_agreement)
    if out is not None:
        require_file_name(Path(out))
        require_replaceable(Path(out), "the result of a check", is_check, overwrite=overwrite)
    result = _compared(Path(bundle), str(reference), text, cluster, progress, force=force).gated(limits)
    if out is not None:
        save_check(result, Path(out))
    return result


def _compared(
    bundle: Path,
    reference: str,
    text: EvaluationText,
    cluster: ClusterOptions | None,
    progress: Progress,
    *,
    force: bool,
) -> Check:
    manifest, checkpoint = opened_pair(bundle, reference)
    corpus, evaluation = evaluation_windows(checkpoint, manifest.capacity, text)
    known = {kind.corpus.sha256 for kind in corpus.kinds}
    name = "shipped" if manifest.model.recipe_sha256 else "unquantized"
    spread = nullcontext() if cluster is None else RayWorkers(cluster, WorkerTask.of(reference, checkpoint, cluster))
    with spread as workers:
        result = check_variants(
            checkpoint,
            lambda: Decoder(checkpoint),
            corpus,
            evaluation,
            [Variant(name, None, bundle)],
            ExportOptions(manifest.dtype, kv_cache_dtype=manifest.kv_cache_dtype),
            progress,
            # What is exported for the check alone has to be where all machines read.
            bundle.resolve().parent if workers else None,
            further_texts(checkpoint, text.further, evaluation.shape[1], known),
            reference_cache(checkpoint, Execution(), force=force),
            workers,
        )
    checkpoint.require_unchanged()
    return result
