"""The parity chain of a bundle: where the bundle first computes something else than model and recipe say."""

from pathlib import Path

from spike_export.artifacts.progress import Progress, silent
from spike_export.calibration.decoder.perplexity import with_bos
from spike_export.engines.parity.chain import Chain, Parity, parity_chain
from spike_export.pipeline.checking.opened_pair import opened_pair, recipe_of
from spike_export.pipeline.checking.result_file import ResultFile
from spike_export.pipeline.evaluation_text import EvaluationText, evaluation_windows

_WINDOWS, _TOKENS = 2, 64
"""A fault shows in any window that reaches the module; the fewer, the less it takes."""


def parity(
    bundle: Path | str,
    reference: Path | str,
    recipe: Path | str | None = None,
    text: EvaluationText = EvaluationText(),
    *,
    out: Path | str | None = None,
    progress: Progress = silent,
    overwrite: bool = False,
) -> Parity:
    """Compare a bundle step by step with transformers' model and with the simulation of its recipe.

    The unquantized model is exported in float32 into the temporary folder, and memory holds it about three times.

    Args:
        bundle: Folder that `export` wrote.
        reference: HF directory, `.gguf` file or hub id of the model.
        recipe: The recipe's file; `recipe.json` beside the bundle by default.
        text: Where the windows come from; the first 64 tokens of two evaluation windows are taken.
        out: JSON file to write the result to.
        progress: Told of the links.
        overwrite: Replace also a file at `out` that is no result of this function.

    Raises:
        ArtifactError: The bundle was made of another checkpoint or recipe, or a file cannot be read or written.
        CheckpointError: The model cannot be read.
        CorpusError: The corpus cannot be used.
        RecipeError: The recipe is malformed, or the windows exceed what the bundle takes.
        EngineError: ONNX Runtime cannot run the bundle, or its graph was changed.
    """
    bundle = Path(bundle)
    file = ResultFile.at(out, "a result of the parity chain", "format", "links", "quantization", overwrite=overwrite)
    manifest, checkpoint = opened_pair(bundle, str(reference))
    plan = recipe_of(bundle, manifest, None if recipe is None else Path(recipe))
    _, windows = evaluation_windows(checkpoint, manifest.capacity, text)
    content = windows[:_WINDOWS, :_TOKENS]
    holds_bos = manifest.prefix is not None and manifest.prefix.holds_bos
    tokens = content if holds_bos else with_bos(content, manifest.bos_token_id)
    result = parity_chain(Chain(checkpoint, plan, tokens), bundle, progress)
    checkpoint.require_unchanged()
    file.write(result.document())
    return result
