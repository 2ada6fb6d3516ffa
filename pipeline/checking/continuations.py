"""Greedy continuations of a bundle beside those of the model that the bundle was made of."""

from pathlib import Path

from spike_export.artifacts.errors import RecipeError
from spike_export.artifacts.progress import Progress, silent
from spike_export.calibration.decoder.layerwise import Decoder
from spike_export.engines.accuracy.continuations import Continuations, compare_continuations
from spike_export.engines.bundle_text import bundle_tokenizer
from spike_export.engines.onnx_runtime.decoding import OnnxDecoding
from spike_export.engines.onnx_runtime.session import open_for_generation
from spike_export.pipeline.checking.opened_pair import opened_pair
from spike_export.pipeline.checking.result_file import ResultFile
from spike_export.pipeline.evaluation_text import EvaluationText, evaluation_windows

_PROMPTS, _PROMPT_TOKENS = 4, 32


def continuations(
    bundle: Path | str,
    reference: Path | str,
    tokens: int,
    text: EvaluationText = EvaluationText(),
    *,
    out: Path | str | None = None,
    progress: Progress = silent,
    overwrite: bool = False,
) -> Continuations:
    """Continue the beginnings of four evaluation windows greedily, by a bundle and by the model.

    Args:
        bundle: Folder that `export` wrote.
        reference: HF directory, `.gguf` file or hub id of the model.
        tokens: Length of the continuations, at least 1.
        text: Where the windows come from.
        out: JSON file to write the result to.
        progress: Told of the passes through the model, at most one for each token.
        overwrite: Replace also a file at `out` that is no result of this function.

    Raises:
        ArtifactError: The bundle was made of another checkpoint, or the result cannot be written.
        CheckpointError: The model cannot be read.
        CorpusError: The corpus cannot be used.
        RecipeError: There are no tokens to write, or the windows exceed what the bundle takes.
        EngineError: ONNX Runtime cannot run the bundle, or the bundle has no room for the tokens.
    """
    bundle = Path(bundle)
    if tokens < 1:
        raise RecipeError(f"--continuations {tokens}: expected a number of tokens of at least 1")
    file = ResultFile.at(out, "a result of --continuations", "format", "continuations", "equal", overwrite=overwrite)
    manifest, checkpoint = opened_pair(bundle, str(reference))
    _, windows = evaluation_windows(checkpoint, manifest.capacity, text)
    tokenizer, prefix = bundle_tokenizer(bundle), manifest.prefix.token_ids if manifest.prefix else ()
    prompts = windows[:_PROMPTS, :_PROMPT_TOKENS]
    runtime = OnnxDecoding(open_for_generation(bundle))
    found = compare_continuations(runtime, Decoder(checkpoint), prompts, prefix, tokens, progress)
    found = found.decoded(lambda part: str(tokenizer.decode(part)))
    checkpoint.require_unchanged()
    file.write(found.document())
    return found
