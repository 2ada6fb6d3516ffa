"""Writes the checkpoint folder: weights, configuration, tokenizer, and the file that says how they were made."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from spike_export.artifacts.errors import CheckpointError
from spike_export.artifacts.files.atomic_write import atomic_path
from spike_export.artifacts.files.free_space import require_free_space
from spike_export.artifacts.files.sole_writer import sole_writer
from spike_export.artifacts.ownership import CHECKPOINT_MARK, is_written_checkpoint, require_replaceable
from spike_export.artifacts.progress import Progress, silent
from spike_export.artifacts.recipe import Dtype, ModulePlan, Recipe, load_recipe, recipe_sha256
from spike_export.calibration.decoder.equivalent.equivalent_weights import transformed_checkpoint
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.checkpoint.opening import open_checkpoint
from spike_export.export.bundle import verify_recipe
from spike_export.export.compressed_tensors.expressible import require_expressible
from spike_export.export.compressed_tensors.prefix_range import exceeded_inputs, with_token_scales
from spike_export.export.compressed_tensors.prefixed_tokenizer import add_prefix
from spike_export.export.compressed_tensors.quantization_config import FORMAT, quantization_config
from spike_export.export.compressed_tensors.weight_shards import write_shards
from spike_export.export.compressed_tensors.weights import stored_tensors
from spike_export.export.files.model_files import generation_config, hf_config
from spike_export.export.files.tokenizer_files import save_tokenizer

_SLACK = 64 << 20
"""Bytes beside the weights: most are a tokenizer's."""


@dataclass(frozen=True)
class CompressedCheckpoint:
    """What was written.

    Attributes:
        static: Linears whose INT8 inputs have a constant scale.
        per_token: Linears whose INT8 inputs have a scale per token.
        kept: Linears that are not quantized, routers included.
        exceeded: Inputs (by their representative linears) that the recipe scales by a constant and the checkpoint per
            token, because the prefix exceeds the constant's range.
        notes: What a caller has to know.
    """

    static: int
    per_token: int
    kept: int
    exceeded: tuple[str, ...]
    notes: tuple[str, ...]


def export_compressed_tensors(
    model: Path | str,
    out: Path | str,
    recipe: Recipe | Path | str,
    *,
    dtype: Dtype | None = None,
    progress: Progress = silent,
    overwrite: bool = False,
) -> CompressedCheckpoint:
    """Write a recipe's model as a Hugging Face checkpoint for vLLM; the folder appears whole or not at all.

    Args:
        model: HF directory, `.gguf` file, or hub id.
        out: The folder; a previous checkpoint there is replaced.
        recipe: What `calibrate` returned or its file, edited or not.
        dtype: Precision of what is not quantized; None for the recipe's.
        progress: Told of every tensor written.
        overwrite: Replace also a folder that spike-export did not write.

    Raises:
        CheckpointError: The model cannot be read or is not supported, or has no tokenizer to put the prefix in.
        RecipeError: The recipe cannot be read, was made for another checkpoint, or cannot be expressed.
        ArtifactError: The folder holds something else, cannot be written, or has too little room; or another process
            writes it.
    """
    plan = load_recipe(recipe) if isinstance(recipe, (str, Path)) else recipe
    destination = Path(out)
    with sole_writer(destination):
        require_replaceable(destination, "a checkpoint", is_written_checkpoint, overwrite=overwrite)
        return write_checkpoint(
            open_checkpoint(str(model)), plan, dtype or plan.scheme.unquantized, destination, progress
        )


def write_checkpoint(
    checkpoint: Checkpoint, recipe: Recipe, dtype: Dtype, destination: Path, progress: Progress = silent
) -> CompressedCheckpoint:
    """Do the same for an open checkpoint. The same inputs and tool versions give byte-identical files."""
    checkpoint_sha256 = checkpoint.tensors.sha256()
    verify_recipe(recipe, checkpoint, checkpoint_sha256)
    require_expressible(recipe, dtype)
    if recipe.prefix is not None and checkpoint.tokenizer is None:
        raise CheckpointError(
            f"{checkpoint.name}: has no tokenizer, which would put the recipe's prefix before every sequence; add the "
            "tokenizer's files, or calibrate with --no-qfep"
        )
    equivalent = transformed_checkpoint(checkpoint, recipe)
    exceeded = exceeded_inputs(equivalent, recipe)
    modules = with_token_scales(recipe.modules, exceeded)
    tensors = list(stored_tensors(equivalent, modules, recipe.scheme.weights, dtype))
    require_free_space(destination, sum(tensor.bytes for tensor in tensors) + _SLACK, "the checkpoint")
    with atomic_path(destination) as folder:
        folder.mkdir()
        write_shards(tensors, folder, progress)
        _write_json(folder / "generation_config.json", generation_config(equivalent))
        quantization = quantization_config(modules, recipe.scheme.weights)
        _write_json(folder / "config.json", {**hf_config(equivalent, dtype), "quantization_config": quantization})
        written = _summary(modules, exceeded, _write_tokenizer(checkpoint, recipe, folder))
        _write_json(folder / CHECKPOINT_MARK, _origin(checkpoint, checkpoint_sha256, recipe, written, folder))
        checkpoint.require_unchanged()
    return written


def _write_tokenizer(checkpoint: Checkpoint, recipe: Recipe, folder: Path) -> tuple[str, ...]:
    tokenizer, prefix = checkpoint.tokenizer, recipe.prefix
    if tokenizer is None:
        return ()
    save_tokenizer(tokenizer, folder, prefix is not None and checkpoint.bos_token_id in prefix.token_ids)
    return () if prefix is None else add_prefix(prefix, tokenizer, folder)


def _summary(
    modules: Mapping[str, ModulePlan], exceeded: frozenset[str], notes: tuple[str, ...]
) -> CompressedCheckpoint:
    kinds = Counter("kept" if plan.number_format is None else str(plan.activations) for plan in modules.values())
    ordered = tuple(name for name in modules if name in exceeded)
    return CompressedCheckpoint(kinds["static"], kinds["per-token"], kinds["kept"], ordered, notes)


def _origin(
    checkpoint: Checkpoint, checkpoint_sha256: str, recipe: Recipe, written: CompressedCheckpoint, folder: Path
) -> dict[str, Any]:
    return {
        "format": 1,
        "kind": FORMAT,
        "model": {"source": checkpoint.name, "checkpoint_sha256": checkpoint_sha256},
        "recipe_sha256": recipe_sha256(recipe),
        "tools": {"spike-export": version("spike-export")},
        "prefix": None if recipe.prefix is None else recipe.prefix.model_dump(include={"token_ids", "text"}),
        "linears": asdict(written),
        "files": sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()),
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
