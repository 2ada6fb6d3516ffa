"""Writes the bundle: the ONNX graph with its weights, the tokenizer, and the files that say how to use them."""

import json
import math
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spike_export.artifacts.errors import RecipeError
from spike_export.artifacts.files.atomic_write import atomic_path
from spike_export.artifacts.files.free_space import require_free_space
from spike_export.artifacts.manifest import (
    DATA_FILE,
    GRAPH_FILE,
    BundlePrefix,
    HeadInfo,
    LinearShare,
    LogitsScope,
    Manifest,
    SourceModel,
    TensorInfo,
    save_manifest,
)
from spike_export.artifacts.process.threads import workers
from spike_export.artifacts.progress import Progress, silent
from spike_export.artifacts.recipe import (
    SMOOTHED_HEAD,
    Dtype,
    KvCacheDtype,
    KvCachePlan,
    ModulePlan,
    NumberFormat,
    Recipe,
    recipe_sha256,
)
from spike_export.calibration.decoder.equivalent.equivalent_weights import transformed_checkpoint
from spike_export.calibration.decoder.equivalent.smoothing import head_scales
from spike_export.calibration.decoder.layerwise import Decoder, Execution
from spike_export.calibration.float8 import float8_modules
from spike_export.calibration.methods.qfem import macs_per_token
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.checkpoint.decoder_config import DecoderConfig
from spike_export.checkpoint.modules import is_router, linears, split_name
from spike_export.export.cache_options import CacheOptions, require_capacity
from spike_export.export.decoder.decoder_graph import build_decoder
from spike_export.export.decoder.head import head_plan, own_weight_bytes
from spike_export.export.engine_support import supporting_engines
from spike_export.export.files.model_files import GENAI, genai_config, genai_obstacle, generation_config, hf_config
from spike_export.export.files.tokenizer_files import save_tokenizer
from spike_export.export.files.weight_file import file_bytes, write_weights
from spike_export.export.graph.linear import number_format
from spike_export.export.graph_plan import GraphPlan, PrefixHome

DATA_LOADER = Path(__file__).parent / "files" / "data_loader.py"
"""A script that Polygraphy reads inputs from; it stands in every bundle as it is."""

_TOOLS = ("spike-export", "numpy", "onnx", "onnx-ir", "transformers")

_SLACK = 64 << 20
"""Bytes beside weights and graph: most are a tokenizer's."""

_NODE_BYTES = 1 << 10
"""Of the graph's own file; with names and places of weights a node takes less than half."""

_MOST_THREADS = 4

_WORTH_THREADS = 64 << 20
"""Bytes of weights; threads of their own gain nothing on less."""


@dataclass(frozen=True)
class ExportOptions:
    """How to export.

    Attributes:
        dtype: Precision of whatever no recipe speaks of: embeddings, residual stream, attention, cache, head, and
            without a recipe the linears too.
        number_format: `fp8` writes the linears that a recipe quantizes to INT8 as W8A8 in FP8 instead.
        cache: Which cache of keys and values the graph has.
        prefix_in: Where the recipe's prefix lives: `cache` costs nothing after the first call; `attention` copies the
            cache once more in every call, and leaves it to runtimes that allocate it themselves.
        logits: Of which tokens the graph gives logits.
        kv_cache_dtype: How the cache holds keys and values; None as the recipe has it: in INT8 where it has steps.
    """

    dtype: Dtype = "float16"
    _: KW_ONLY
    number_format: NumberFormat = "int8"
    cache: CacheOptions = field(default_factory=CacheOptions)
    prefix_in: PrefixHome = "cache"
    logits: LogitsScope = "all"
    kv_cache_dtype: KvCacheDtype | None = None

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        if self.prefix_in == "attention" and self.cache.kind == "static":
            raise RecipeError(
                "--prefix-in attention copies the cache in every call, and --kv-cache static avoids such copies; give "
                "one of the two"
            )


def export_bundle(
    checkpoint: Checkpoint,
    recipe: Recipe | None,
    options: ExportOptions,
    destination: Path,
    progress: Progress = silent,
) -> Manifest:
    """Write a bundle folder; it appears whole or not at all.

    The same checkpoint, recipe, options and tool versions give byte-identical files.

    Args:
        checkpoint: The model.
        recipe: Precision and scale of every decoder linear, and the prefix; None leaves all unquantized.
        options: Precision of the rest, and the cache.
        destination: The bundle's folder; a previous one is replaced.
        progress: Told of every tensor written.

    Raises:
        RecipeError: The recipe was made for another checkpoint, or its modules are not this decoder's; or a static
            cache is to hold more tokens than the model can place.
        CheckpointError: A weight cannot be read, or the weights' files changed meanwhile.
        ArtifactError: The place cannot be written to, or has too little room.
    """
    require_capacity(options.cache, checkpoint.config)
    source = checkpoint
    checkpoint_sha256 = checkpoint.tensors.sha256()
    if recipe is not None:
        verify_recipe(recipe, checkpoint, checkpoint_sha256)
        checkpoint = transformed_checkpoint(checkpoint, recipe)
    plan = _graph_plan(checkpoint, recipe, options)
    model = build_decoder(checkpoint, plan)
    manifest = _manifest(checkpoint, checkpoint_sha256, recipe, plan, model)
    model.metadata_props.update(_model_metadata(manifest))
    _require_space(destination, model)
    with atomic_path(destination) as folder:
        folder.mkdir()
        _write_graph(model, folder, progress)
        _write_companions(checkpoint, manifest, folder)
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        manifest = manifest.model_copy(update={"files": tuple(names)})
        save_manifest(manifest, folder)
        source.require_unchanged()
    return manifest


def verify_recipe(recipe: Recipe, checkpoint: Checkpoint, checkpoint_sha256: str) -> None:
    """Refuse a recipe that does not belong to the checkpoint.

    Raises:
        RecipeError: Names the difference and the remedy.
    """
    if recipe.model.sha256 != checkpoint_sha256:
        raise RecipeError(
            f"the recipe was made for {recipe.model.source} (sha256 {recipe.model.sha256[:12]}), not for "
            f"{checkpoint.name} (sha256 {checkpoint_sha256[:12]}); calibrate this model, or export the recipe's own"
        )
    expected = linears(checkpoint.config)
    missing = [name for name in expected if name not in recipe.modules]
    if missing:
        raise RecipeError(
            f"the recipe lacks module {missing[0]}{_more(missing)}; add its precision, or calibrate again"
        )
    unknown = sorted(set(recipe.modules) - set(expected))
    if unknown:
        raise RecipeError(
            f"the recipe names module {unknown[0]}{_more(unknown)}, which is no linear of this decoder; remove it"
        )
    routers = [name for name, plan in recipe.modules.items() if is_router(name) and plan.number_format]
    if routers:
        raise RecipeError(
            f"the recipe quantizes {routers[0]}{_more(routers)}, which is a router and cannot be quantized; set its "
            "precision to float32"
        )
    blocks = {f"model.layers.{index}.self_attn" for index in range(checkpoint.config.num_hidden_layers)}
    unknown = sorted(set(recipe.attention) - blocks)
    if unknown:
        raise RecipeError(
            f"the recipe's attention names {unknown[0]}{_more(unknown)}, which is no attention block of this decoder; "
            f"remove it"
        )
    if recipe.kv_cache and set(recipe.kv_cache) != blocks:
        name = sorted(blocks.symmetric_difference(recipe.kv_cache))[0]
        raise RecipeError(
            f"the recipe's kv_cache has to name each attention block of this decoder and no other; {name} is amiss: "
            "calibrate again, or export with --kv-cache-dtype unquantized"
        )
    strange = [token for token in recipe.prefix_ids if not 0 <= token < checkpoint.config.vocab_size]
    if strange:
        raise RecipeError(
            f"the recipe's prefix holds token {strange[0]}, outside the vocabulary of "
            f"{checkpoint.config.vocab_size}; correct prefix.token_ids, or calibrate again"
        )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _kv_cache(recipe: Recipe | None, options: ExportOptions) -> Mapping[str, KvCachePlan]:
    """Return the steps of an INT8 cache; empty for one that is not quantized.

    Raises:
        RecipeError: There are no steps for the cache that is asked for, or it does not go with FP8.
    """
    wanted, known = options.kv_cache_dtype, {} if recipe is None else recipe.kv_cache
    if wanted == "int8" and not known:
        raise RecipeError(
            "--kv-cache-dtype int8 needs a recipe with steps for keys and values; calibrate with --kv-cache-dtype int8"
        )
    if wanted == "unquantized" or not known:
        return {}
    if options.number_format == "fp8":
        raise RecipeError(
            "--number-format fp8 does not go with keys and values in INT8; export with --kv-cache-dtype unquantized"
        )
    return known


def _graph_plan(checkpoint: Checkpoint, recipe: Recipe | None, options: ExportOptions) -> GraphPlan:
    kv_cache = _kv_cache(recipe, options)
    if recipe is None:
        kept = ModulePlan(precision=options.dtype)
        router = ModulePlan(precision="float32", reason="router")
        plans = {name: router if is_router(name) else kept for name in linears(checkpoint.config)}
        return GraphPlan(plans, "int8-per-channel", options.dtype, cache=options.cache, logits=options.logits)
    ids, scheme = recipe.prefix_ids, recipe.scheme
    prefix = Decoder(checkpoint, Execution(resident=False)).prefix_key_values(ids) if ids else ()
    return GraphPlan(
        modules=float8_modules(recipe) if options.number_format == "fp8" else recipe.modules,
        weights=scheme.weights,
        dtype=options.dtype,
        prefix=prefix,
        prefix_in=options.prefix_in,
        attention=recipe.attention,
        kv_cache=kv_cache,
        head=scheme.head,
        head_scales=_head_scales(checkpoint.config, recipe),
        cache=options.cache,
        logits=options.logits,
    )


def _head_scales(config: DecoderConfig, recipe: Recipe) -> NDArray[np.float32] | None:
    if recipe.head_smoothing is None:
        return None
    # Of another model it is refused, also where this head has no use for it.
    scales = head_scales(recipe.head_smoothing, config)
    return scales if recipe.scheme.head == SMOOTHED_HEAD else None


def _threads(model: ir.Model) -> int:
    """Return how many tensors are made at a time: memory holds as many."""
    return 1 if file_bytes(model) < _WORTH_THREADS else workers(_MOST_THREADS)


def _require_space(destination: Path, model: ir.Model) -> None:
    nodes = sum(len(graph) for graph in model.graphs())
    needed = file_bytes(model) + nodes * _NODE_BYTES + _SLACK
    require_free_space(destination, needed, "the bundle")


def _write_graph(model: ir.Model, folder: Path, progress: Progress) -> None:
    # onnx.checker takes a while to import, and `--help` must not wait for it.
    import onnx

    path, threads = folder / GRAPH_FILE, _threads(model)
    with _one_torch_thread() if threads > 1 else nullcontext():
        write_weights(model, folder / DATA_FILE, threads, partial(progress, "tensors"))
    ir.save(model, path)
    # onnx-ir checks nothing. By path, the checker reads the graph and leaves the weights on the disk.
    onnx.checker.check_model(path, full_check=True)


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Let torch, which widens what is read, compute on the thread that asks: the others have tensors of their own."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _write_companions(checkpoint: Checkpoint, manifest: Manifest, folder: Path) -> None:
    _write_json(folder / "config.json", hf_config(checkpoint, manifest.dtype))
    _write_json(folder / "generation_config.json", generation_config(checkpoint))
    shutil.copyfile(DATA_LOADER, folder / DATA_LOADER.name)
    if manifest.kv_cache == "dynamic":  # onnxruntime-genai knows no `write_indices` and no `fresh`
        _write_json(folder / "genai_config.json", genai_config(checkpoint, manifest.unsupported.get(GENAI)))
    if checkpoint.tokenizer is not None:
        holds_bos = manifest.prefix is not None and manifest.prefix.holds_bos
        save_tokenizer(checkpoint.tokenizer, folder, holds_bos)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _manifest(
    checkpoint: Checkpoint, checkpoint_sha256: str, recipe: Recipe | None, plan: GraphPlan, model: ir.Model
) -> Manifest:
    config, linear_shares = checkpoint.config, _linear_shares(checkpoint, plan)
    obstacle = genai_obstacle(plan)
    return Manifest(
        model=SourceModel(
            source=checkpoint.name,
            architecture=config.family.model_type,
            checkpoint_sha256=checkpoint_sha256,
            recipe_sha256=None if recipe is None else recipe_sha256(recipe),
        ),
        tools={tool: version(tool) for tool in _TOOLS},
        dtype=plan.dtype,
        kv_cache=plan.cache.kind,
        kv_cache_dtype="int8" if plan.kv_cache else "unquantized",
        capacity=plan.cache.capacity,
        cache_slots=plan.cache.slots(plan.prefix_length),
        bos_token_id=checkpoint.bos_token_id,
        eos_token_ids=config.eos_token_ids,
        prefix=_bundle_prefix(checkpoint, recipe, plan),
        linears=linear_shares,
        head=_head_info(checkpoint.config, plan),
        engines=supporting_engines(plan.dtype, linear_shares, scattered=_scattered(plan)),
        logits=plan.logits,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        sliding_window=config.sliding_window,
        inputs=tuple(_tensor_info(value) for value in model.graph.inputs),
        outputs=tuple(_tensor_info(value) for value in model.graph.outputs),
        unsupported={} if obstacle is None else {GENAI: obstacle},
    )


def _scattered(plan: GraphPlan) -> str:
    """Return the type of a cache that is written in place; an empty string for one that grows."""
    return "" if plan.cache.kind == "dynamic" else "int8" if plan.kv_cache else plan.dtype


def _model_metadata(manifest: Manifest) -> dict[str, str]:
    """Return what a viewer of the graph shows of the manifest."""
    prefix = manifest.prefix
    entries = {
        "bundle_format": str(manifest.format),
        "source_model": manifest.model.source,
        "architecture": manifest.model.architecture,
        "checkpoint_sha256": manifest.model.checkpoint_sha256,
        "recipe_sha256": manifest.model.recipe_sha256,
        "dtype": manifest.dtype,
        "kv_cache": manifest.kv_cache,
        "kv_cache_dtype": None if manifest.kv_cache_dtype == "unquantized" else manifest.kv_cache_dtype,
        "linears": ", ".join(f"{kind}: {share.modules}" for kind, share in manifest.linears.items()),
        "prefix_text": prefix.text if prefix else None,
        "prefix_token_ids": " ".join(map(str, prefix.token_ids)) if prefix else None,
        "prefix_in": ("cache" if prefix.in_cache else "attention") if prefix else None,
    }
    return {key: value for key, value in entries.items() if value is not None}


def _bundle_prefix(checkpoint: Checkpoint, recipe: Recipe | None, plan: GraphPlan) -> BundlePrefix | None:
    if recipe is None or recipe.prefix is None:
        return None
    ids = recipe.prefix.token_ids
    return BundlePrefix(
        token_ids=ids,
        text=recipe.prefix.text,
        length=len(ids),
        holds_bos=checkpoint.bos_token_id in ids,
        in_cache=plan.prefix_in == "cache",
    )


def _linear_shares(checkpoint: Checkpoint, plan: GraphPlan) -> dict[str, LinearShare]:
    needed = macs_per_token(checkpoint.config)
    modules: Counter[str] = Counter()
    macs, per_token = defaultdict[str, float](float), defaultdict[str, float](float)
    for name, module in plan.modules.items():
        kind, size = number_format(module), needed[split_name(name)[1]]
        modules[kind] += 1
        macs[kind] += size
        per_token[kind] += size if module.per_token else 0.0
    total = sum(macs.values())
    return {
        kind: LinearShare(modules=modules[kind], mac_share=macs[kind] / total, per_token_share=per_token[kind] / total)
        for kind in sorted(modules)
    }


def _head_info(config: DecoderConfig, plan: GraphPlan) -> HeadInfo:
    macs = config.vocab_size * config.hidden_size
    linears = config.num_hidden_layers * math.fsum(macs_per_token(config).values())
    return HeadInfo(
        format=number_format(head_plan(plan.head, plan.dtype)),
        mac_share=macs / (macs + linears),
        weight_bytes=own_weight_bytes(config, plan),
    )


def _tensor_info(value: ir.Value) -> TensorInfo:
    assert value.shape is not None
    assert value.dtype is not None
    dimensions = tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)
    return TensorInfo(name=str(value.name), dtype=value.dtype.numpy().name, shape=dimensions)
