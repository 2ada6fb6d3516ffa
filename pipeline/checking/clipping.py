"""What a user's text clips in a bundle, and whether calibrating anew is due."""

from pathlib import Path

from spike_export.artifacts.errors import CorpusError
from spike_export.artifacts.progress import Progress, silent
from spike_export.calibration.corpus.chat import rendered
from spike_export.calibration.corpus.files import OWN_TEXT, CorpusOptions, OwnText, load_corpora
from spike_export.calibration.corpus.model_windows import tokenizer_windows
from spike_export.engines.accuracy.clipping import Clipping, measure_clipping
from spike_export.engines.bundle_text import bundle_tokenizer
from spike_export.engines.onnx_runtime.session import runnable_manifest
from spike_export.pipeline.checking.result_file import ResultFile
from spike_export.pipeline.job import require_room


def clipping(
    bundle: Path | str,
    text: CorpusOptions,
    *,
    length: int = 512,
    out: Path | str | None = None,
    progress: Progress = silent,
    overwrite: bool = False,
) -> Clipping:
    """Count what a text clips at every input with a static scale, and measure what that costs there.

    The model is not needed: the bundle is compared with its own graph without clipping.

    Args:
        bundle: Folder that `export` wrote.
        text: One source of text.
        length: Tokens per window, BOS included.
        out: JSON file to write the result to.
        progress: Told of the windows.
        overwrite: Replace also a file at `out` that is no result of this function.

    Raises:
        ArtifactError: The manifest cannot be read, or the result cannot be written.
        CorpusError: The text cannot be used.
        RecipeError: The windows are longer than the bundle's static cache.
        EngineError: No input has a static scale, there is no tokenizer, or ONNX Runtime cannot run the bundle.
    """
    bundle = Path(bundle)
    file = ResultFile.at(out, "a result of --clipping", "format", "due", "inputs", overwrite=overwrite)
    manifest = runnable_manifest(bundle)
    require_room(length, manifest.capacity)
    (read,) = load_corpora(text)
    if isinstance(read, OwnText):
        raise CorpusError(f"--clipping {OWN_TEXT}: the model has written no text yet; give a text")
    tokenizer = bundle_tokenizer(bundle)
    corpus = rendered(read, tokenizer)
    windows = tokenizer_windows(tokenizer, manifest.bos_token_id, manifest.vocab_size, corpus, length - 1)
    result = measure_clipping(bundle, corpus.name, windows, progress)
    file.write(result.document())
    return result
