"""`spike-export export MODEL`: the ONNX bundle of a recipe, or its checkpoint for vLLM."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from spike_export.cli.arguments import (
    AsJson,
    DtypeArguments,
    FormatArguments,
    GraphArguments,
    Model,
    RunArguments,
    ThreadArguments,
)
from spike_export.cli.exit_codes import DONE
from spike_export.cli.invocation import record
from spike_export.cli.options import cache_options, use_threads
from spike_export.cli.terminal.lines import print_lines
from spike_export.cli.terminal.output import Output

_UNGUARDED = (
    "no calibration has seen whether activations stay below float16's limit of 65,504; `spike-export check` "
    "tells, and --dtype bfloat16 has no such limit"
)


def export(
    model: Model,
    /,
    *,
    out: Annotated[Path, Parameter(help="Folder for the bundle; a previous bundle there is replaced.")],
    form: Annotated[
        Literal["onnx", "compressed-tensors"],
        Parameter(
            name="--format",
            help="What to write: an ONNX bundle, or a Hugging Face checkpoint for vLLM (compressed-tensors).",
        ),
    ] = "onnx",
    recipe: Annotated[Path | None, Parameter(help="Recipe that calibrate wrote; it may be edited.")] = None,
    quantize: Annotated[bool, Parameter(help="Quantize; --no-quantize needs no recipe.")] = True,
    dtype: Annotated[
        DtypeArguments | None, Parameter(help="Default: the recipe's precision, or float16 without a recipe.")
    ] = None,
    graph: GraphArguments = GraphArguments(),
    number_format: FormatArguments = FormatArguments(),
    prefix_in: Annotated[
        Literal["cache", "attention"],
        Parameter(
            help="Keep the prefix in the cache, or add it in attention in every call. In attention, every call copies "
            "the cache, and onnxruntime-genai can run the bundle."
        ),
    ] = "cache",
    kv_cache_dtype: Annotated[
        Literal["unquantized", "int8"] | None,
        Parameter(help="Keys and values in the cache (default: INT8 where the recipe has steps for them)."),
    ] = None,
    threads: ThreadArguments = ThreadArguments(),
    as_json: AsJson = False,
    run_options: RunArguments = RunArguments(),
) -> int:
    """Write the ONNX bundle of a model by a recipe, or its checkpoint for vLLM."""
    use_threads(threads)
    from spike_export.artifacts.errors import RecipeError

    output = Output(run_options.quiet, as_json)
    if form == "compressed-tensors":
        given = (graph, number_format, prefix_in, kv_cache_dtype)
        graph_options = given != (GraphArguments(), FormatArguments(), "cache", None)
        if recipe is None or not quantize:
            raise RecipeError("--format compressed-tensors needs --recipe FILE: vLLM loads other models as they are")
        if graph_options:
            raise RecipeError(
                "--kv-cache, --capacity, --kv-cache-dtype, --logits, --prefix-in and --number-format are of ONNX "
                "graphs; leave them out with --format compressed-tensors"
            )
        return _export_checkpoint(model, out, recipe, dtype, output, run_options)
    if quantize == (recipe is None):
        raise RecipeError(
            "export needs --recipe FILE, or --no-quantize to export the model as it is"
            if recipe is None
            else "--recipe and --no-quantize contradict each other; give one"
        )
    from spike_export.export.model_export import export as export_model

    with output.progress("bundle") as progress:
        manifest = export_model(
            model,
            out,
            recipe,
            dtype=dtype.dtype if dtype else None,
            number_format=number_format.number_format,
            cache=cache_options(graph),
            prefix_in=prefix_in,
            logits=graph.logits,
            kv_cache_dtype=kv_cache_dtype,
            progress=progress,
            overwrite=run_options.overwrite,
        )
    record(*_beside(out, recipe))
    notes = [_UNGUARDED] if recipe is None and manifest.dtype == "float16" else []
    document = {
        "bundle": str(out),
        "dtype": manifest.dtype,
        "linears": {name: share.model_dump(mode="json") for name, share in manifest.linears.items()},
        "prefix": None if manifest.prefix is None else manifest.prefix.model_dump(mode="json"),
        "notes": notes,
    }
    output.result(document, lambda console: print_lines(console, *_noted(notes), f"bundle: {out}"))
    return DONE


def _beside(out: Path, recipe: Path | None) -> list[Path]:
    """Return the folders that may be a run's: of what is written, and of the recipe."""
    return [path.absolute().parent for path in (out, recipe) if path is not None]


def _noted(notes: Sequence[str]) -> list[str]:
    return [f"note: {note}" for note in notes]


def _export_checkpoint(
    model: str, out: Path, recipe: Path, dtype: DtypeArguments | None, output: Output, run_options: RunArguments
) -> int:
    from spike_export.export.compressed_tensors.checkpoint_export import export_compressed_tensors

    with output.progress("checkpoint") as progress:
        written = export_compressed_tensors(
            model,
            out,
            recipe,
            dtype=dtype.dtype if dtype else None,
            progress=progress,
            overwrite=run_options.overwrite,
        )
    record(*_beside(out, recipe))
    moved = len(written.exceeded)
    lines = (
        f"linears: {written.static} static, {written.per_token} per token, {written.kept} not quantized",
        *((f"scaled per token because the prefix exceeds the static range: {moved} inputs",) if moved else ()),
        *_noted(written.notes),
        f"checkpoint: {out}",
    )
    output.result({"checkpoint": str(out), **asdict(written)}, lambda console: print_lines(console, *lines))
    return DONE
