"""The check of a bundle by itself, without the run that made it."""

from pathlib import Path

from spike_export.artifacts.check_document import Check
from spike_export.artifacts.errors import ArtifactError
from spike_export.artifacts.progress import Progress
from spike_export.calibration.corpus.chat import rendered
from spike_export.calibration.corpus.files import CorpusOptions, load_corpus
from spike_export.calibration.corpus.token_windows import token_windows
from spike_export.calibration.decoder.layerwise import Decoder
from spike_export.checkpoint.opening import open_checkpoint
from spike_export.engines.accuracy.variants import Variant, check_variants
from spike_export.engines.onnx_runtime.session import runnable_manifest
from spike_export.export.bundle import ExportOptions
from spike_export.pipeline.evaluation_text import EvaluationText
from spike_export.pipeline.job import require_length, require_room


def check_bundle(bundle: Path, reference: str, arguments: EvaluationText, progress: Progress) -> Check:
    """Compare a bundle with the model it was made of, on the corpus's evaluation windows.

    Raises:
        ArtifactError: The bundle was made of another checkpoint.
        CorpusError: The corpus cannot be used.
        RecipeError: The windows are longer than the model's sequences, or than its static cache.
        EngineError: ONNX Runtime cannot run the bundle.
    """
    manifest = runnable_manifest(bundle)
    checkpoint = open_checkpoint(reference)
    if manifest.model.checkpoint_sha256 != checkpoint.tensors.sha256():
        raise ArtifactError(f"{bundle}: was made of {manifest.model.source}, and {reference} has other weights")
    require_length(arguments.length, checkpoint)
    require_room(arguments.length, manifest.capacity)
    options = CorpusOptions(arguments.corpus, arguments.text_field, arguments.corpus_split, arguments.chat_template)
    corpus = rendered(load_corpus(options), checkpoint.tokenizer)
    windows = token_windows(
        corpus,
        checkpoint.tokenizer,
        arguments.samples,
        arguments.length - 1,
        arguments.seed,
        arguments.windows,
        checkpoint.bos_token_id,
    )
    name = "shipped" if manifest.model.recipe_sha256 else "unquantized"
    return check_variants(
        checkpoint,
        lambda: Decoder(checkpoint),
        corpus,
        windows.evaluation,
        [Variant(name, None, bundle)],
        ExportOptions(manifest.dtype),
        progress,
    )
