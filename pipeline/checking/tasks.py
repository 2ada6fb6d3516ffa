"""Standard tasks of a bundle, beside those of the model that the bundle was made of."""

from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from spike_export.artifacts.errors import EngineError, RecipeError
from spike_export.artifacts.manifest import Manifest
from spike_export.artifacts.progress import Progress, silent
from spike_export.artifacts.results.task_document import TASK_KEYS, TaskAccuracy
from spike_export.calibration.decoder.layerwise import Decoder, Execution
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.engines.engine import Engine
from spike_export.engines.generation.bundle_tokenizer import BundleTokenizer
from spike_export.engines.onnx_runtime.session import open_bundle
from spike_export.engines.tasks.continuation_scores import bundle_model, decoder_model
from spike_export.engines.tasks.written_texts import TextRequest, written
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.cache_options import CacheOptions
from spike_export.export.unquantized import unquantized_recipe
from spike_export.pipeline.checking.opened_pair import opened_pair
from spike_export.pipeline.checking.result_file import ResultFile


def task_accuracy(
    bundle: Path | str,
    reference: Path | str,
    tasks: Sequence[str],
    *,
    items: int | None = None,
    max_flips: float | None = None,
    out: Path | str | None = None,
    progress: Progress = silent,
    overwrite: bool = False,
) -> TaskAccuracy:
    """Let lm-evaluation-harness judge a bundle, and the unquantized model behind the same prefix, on the same items.

    For likelihoods the model passes layer by layer, so that one larger than memory can be judged. Where a task asks for
    texts, the model writes them as a bundle in float32, which is exported into a temporary folder. A task file may name
    Python functions, which are run.

    Args:
        bundle: Folder that `export` wrote.
        reference: HF directory, `.gguf` file or hub id of the model.
        tasks: Names of tasks, groups or tags of the harness, or YAML files.
        items: Only so many items of each task, the first ones.
        max_flips: Largest share of answers that turn right or wrong, such as 0.05; `passed` of the result says whether
            the 95 % interval of every task keeps to it.
        out: JSON file to write the result to.
        progress: Told of the batches of the bundle, then of the layers of the model.
        overwrite: Replace also a file at `out` that is no result of this function.

    Raises:
        ArtifactError: The bundle was made of another checkpoint or has another tokenizer, or the result cannot be
            written.
        CheckpointError: The model cannot be read.
        RecipeError: A limit is out of range.
        EngineError: The extra `lm-eval` is not installed, a task cannot be used, a text is too long, or ONNX Runtime
            cannot run the bundle.
    """
    bundle = Path(bundle)
    _require_options(tasks, items, max_flips)
    file = ResultFile.at(out, "a result of --tasks", *TASK_KEYS, overwrite=overwrite)
    _require_harness()
    from spike_export.engines.tasks.evaluation import compared
    from spike_export.engines.tasks.harness_model import HarnessModel
    from spike_export.engines.tasks.loading import load_tasks

    manifest, checkpoint = opened_pair(bundle, str(reference))
    tokenizer, loaded = BundleTokenizer.read(bundle), load_tasks(tasks)
    encode = partial(tokenizer.encode, add_special_tokens=False)
    prefix = manifest.prefix.token_ids if manifest.prefix else ()
    session = open_bundle(bundle, all_logits=True)
    quantized = HarnessModel(bundle_model(session, progress), partial(_written, bundle, progress), encode, manifest)
    decoder = Decoder(checkpoint, Execution(resident=False))
    write = partial(_unquantized, checkpoint, manifest, progress)
    unquantized = HarnessModel(decoder_model(decoder, prefix, progress), write, encode, manifest)
    rows = compared(loaded, quantized, unquantized, items)
    checkpoint.require_unchanged()
    model = manifest.model
    result = TaskAccuracy(
        lm_eval=version("lm-eval"),
        checkpoint_sha256=model.checkpoint_sha256,
        recipe_sha256=model.recipe_sha256,
        prefix=prefix,
        max_flips=max_flips,
        tasks=rows,
    )
    file.write(result.document())
    return result


def _written(bundle: Path, progress: Progress, requests: Sequence[TextRequest]) -> list[str]:
    with Engine.open(bundle) as engine:
        return written(engine.generate, requests, progress)


def _unquantized(
    checkpoint: Checkpoint, manifest: Manifest, progress: Progress, requests: Sequence[TextRequest]
) -> list[str]:
    """Return the texts of the model that a bundle was made of, behind the bundle's prefix and in ONNX Runtime too."""
    prefix, cache = manifest.prefix, CacheOptions(manifest.kv_cache, manifest.capacity)
    recipe = unquantized_recipe(checkpoint, prefix.token_ids, prefix.text) if prefix else None
    with TemporaryDirectory(prefix="spike-export-") as folder:
        bundle = Path(folder) / "bundle"
        export_bundle(checkpoint, recipe, ExportOptions("float32", cache=cache), bundle)
        return _written(bundle, progress, requests)


def _require_options(tasks: Sequence[str], items: int | None, max_flips: float | None) -> None:
    if not tasks:
        raise RecipeError("--tasks names no task; give names of tasks, or YAML files")
    if items is not None and items < 1:
        raise RecipeError(f"--items is {items}; expected a number of items of at least 1")
    if max_flips is not None and not 0 <= max_flips <= 1:
        raise RecipeError(f"--max-flips is {max_flips}; expected a share such as 0.05")


def _require_harness() -> None:
    if find_spec("lm_eval") is None:
        raise EngineError("--tasks needs the package lm-eval; install the extra: pip install 'spike-export[lm-eval]'")
