"""`spike-export export MODEL`: the ONNX bundle of a recipe, or its checkpoint for vLLM."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.text import Text

from spike_export.cli.arguments import (
    DtypeArguments,
    FormatArguments,
    GraphArguments,
    Model,
    RunArguments,
    ThreadArguments,
)
from spike_export.cli.exit_codes import DONE
from spike_export.cli.options import cache_options, use_threads

_UNGUARDED = (
    "note: no calibration has seen whether activations stay below float16's limit of 65,504; `spike-export check` "
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
    threads: ThreadArguments = ThreadArguments(),
    run_options: RunArguments = RunArguments(),
) -> int:
    """Write the ONNX bundle of a model by a recipe, or its checkpoint for vLLM."""
    use_threads(threads)
    from spike_export.artifacts.errors import RecipeError

    if form == "compressed-tensors":
        graph_options = (graph, number_format, prefix_in) != (GraphArguments(), FormatArguments(), "cache")
        if recipe is None or not quantize:
            raise RecipeError("--format compressed-tensors needs --recipe FILE: vLLM loads other models as they are")
        if graph_options:
            raise RecipeError(
                "--kv-cache, --capacity, --logits, --prefix-in and --number-format are of ONNX graphs; leave them out "
                "with --format compressed-tensors"
            )
        return _export_checkpoint(model, out, recipe, dtype, run_options)
    if quantize == (recipe is None):
        raise RecipeError(
            "export needs --recipe FILE, or --no-quantize to export the model as it is"
            if recipe is None
            else "--recipe and --no-quantize contradict each other; give one"
        )
    from spike_export.cli.terminal.progress_display import ProgressDisplay
    from spike_export.export.model_export import export as export_model

    console = Console()
    with (
        ProgressDisplay(console, ["bundle"], quiet=run_options.quiet) as display,
        display.stage("bundle") as progress,
    ):
        manifest = export_model(
            model,
            out,
            recipe,
            dtype=dtype.dtype if dtype else None,
            number_format=number_format.number_format,
            cache=cache_options(graph),
            prefix_in=prefix_in,
            logits=graph.logits,
            progress=progress,
            overwrite=run_options.overwrite,
        )
    if not run_options.quiet:
        if recipe is None and manifest.dtype == "float16":
            console.print(Text(_UNGUARDED), soft_wrap=True)
        console.print(Text(f"bundle: {out}"), soft_wrap=True)
    return DONE


def _export_checkpoint(
    model: str, out: Path, recipe: Path, dtype: DtypeArguments | None, run_options: RunArguments
) -> int:
    from spike_export.cli.terminal.progress_display import ProgressDisplay
    from spike_export.export.compressed_tensors.checkpoint_export import export_compressed_tensors

    console = Console()
    with (
        ProgressDisplay(console, ["checkpoint"], quiet=run_options.quiet) as display,
        display.stage("checkpoint") as progress,
    ):
        written = export_compressed_tensors(
            model,
            out,
            recipe,
            dtype=dtype.dtype if dtype else None,
            progress=progress,
            overwrite=run_options.overwrite,
        )
    if not run_options.quiet:
        moved = len(written.exceeded)
        lines = (
            f"linears: {written.static} static, {written.per_token} per token, {written.kept} not quantized",
            *((f"scaled per token because the prefix exceeds the static range: {moved} inputs",) if moved else ()),
            *(f"note: {note}" for note in written.notes),
            f"checkpoint: {out}",
        )
        for line in lines:
            console.print(Text(line), soft_wrap=True)
    return DONE
