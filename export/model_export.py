"""The bundle of a model, from the places of model and recipe."""

from pathlib import Path

from spike_export.artifacts.files.sole_writer import sole_writer
from spike_export.artifacts.manifest import LogitsScope, Manifest
from spike_export.artifacts.progress import Progress, silent
from spike_export.artifacts.recipe import Dtype, KvCacheDtype, NumberFormat, Recipe, load_recipe
from spike_export.checkpoint.opening import open_checkpoint
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.cache_options import CacheOptions
from spike_export.export.graph_plan import PrefixHome
from spike_export.export.preconditions import require_bundle_or_nothing, require_quantized


def export(
    model: Path | str,
    out: Path | str,
    recipe: Recipe | Path | str | None = None,
    *,
    dtype: Dtype | None = None,
    number_format: NumberFormat = "int8",
    cache: CacheOptions = CacheOptions(),
    prefix_in: PrefixHome = "cache",
    logits: LogitsScope = "all",
    kv_cache_dtype: KvCacheDtype | None = None,
    progress: Progress = silent,
    overwrite: bool = False,
) -> Manifest:
    """Write the ONNX bundle of a recipe; the folder appears whole or not at all.

    Args:
        model: HF directory, `.gguf` file, or hub id.
        out: The bundle's folder; a previous bundle there is replaced.
        recipe: What `calibrate` returned or its file, edited or not; None exports the model without quantization.
        dtype: Precision of what is not quantized; None for the recipe's, or float16 without a recipe.
        number_format: `fp8` writes in FP8 E4M3 what the recipe quantizes to INT8.
        cache: Which cache of keys and values the graph has.
        prefix_in: Where the recipe's prefix lives: in the `cache`, or before it, in `attention`, at the cost of a
            copy of the cache per call.
        logits: Of which tokens the graph gives logits.
        kv_cache_dtype: How the cache holds keys and values; None as the recipe has it: in INT8 where it has steps.
        progress: Told of every tensor written.
        overwrite: Replace also a folder that is no bundle, or holds other files too.

    Returns:
        The content of the bundle's `manifest.json`.

    Raises:
        CheckpointError: The model cannot be read or is not supported.
        RecipeError: The recipe cannot be read or was made for another checkpoint, or options contradict each other.
        ArtifactError: The folder holds something else, cannot be written, or has too little room; or another process
            writes it.
    """
    require_quantized(number_format, recipe is not None)
    plan = load_recipe(recipe) if isinstance(recipe, (str, Path)) else recipe
    known = plan.scheme.unquantized if plan else "float16"
    options = ExportOptions(
        dtype or known,
        number_format=number_format,
        cache=cache,
        prefix_in=prefix_in,
        logits=logits,
        kv_cache_dtype=kv_cache_dtype,
    )
    with sole_writer(Path(out)):
        require_bundle_or_nothing(Path(out), overwrite=overwrite)
        return export_bundle(open_checkpoint(str(model)), plan, options, Path(out), progress)
