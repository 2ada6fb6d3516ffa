"""`spike-export check BUNDLE`: its accuracy, its parity step by step, or what the linter finds in its graph."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.text import Text

from spike_export.artifacts.errors import ArtifactError
from spike_export.cli.arguments import CorpusArguments, GateArguments, RunArguments, ThreadArguments
from spike_export.cli.exit_codes import DONE, GATE_MISSED
from spike_export.cli.options import evaluation_text, use_threads
from spike_export.cli.verdicts import accuracy_verdict

if TYPE_CHECKING:
    from spike_export.pipeline.evaluation_text import EvaluationText


def check(
    bundle: Annotated[Path, Parameter(help="Folder that export wrote; with --lint also any .onnx file.")],
    /,
    *,
    reference: Annotated[str | None, Parameter(help="Model that the bundle was made of; not with --lint.")] = None,
    lint: Annotated[
        bool,
        Parameter(negative="", help="Lint the graph: report what TensorRT or ONNX Runtime refuses or runs slowly."),
    ] = False,
    parity: Annotated[
        bool,
        Parameter(
            negative="",
            help="Compare every step of the graph with transformers and with the simulation of the recipe: name the "
            "first module that computes something else.",
        ),
    ] = False,
    recipe: Annotated[
        Path | None, Parameter(help="With --parity: the bundle's recipe (default: recipe.json beside the bundle).")
    ] = None,
    clipping: Annotated[
        str | None,
        Parameter(help="Count what this text drives beyond the static scales, and what that costs; needs no model."),
    ] = None,
    json_file: Annotated[
        Path | None, Parameter(name="--json", help="With --lint, --parity or --clipping: file for the result.")
    ] = None,
    out: Annotated[
        Path | None, Parameter(help="File for the result (default: BUNDLE.check.json, beside the bundle).")
    ] = None,
    corpus: CorpusArguments = CorpusArguments(),
    gate: GateArguments = GateArguments(),
    threads: ThreadArguments = ThreadArguments(),
    run_options: RunArguments = RunArguments(),
) -> int:
    """Compare a bundle with the unquantized model (perplexity, agreement, KL), or --parity, --clipping, --lint."""
    use_threads(threads)
    if lint:
        if reference is not None or out is not None or parity or clipping is not None:
            raise ArtifactError("check --lint reads only the graph; omit --reference, --out, --parity and --clipping")
        return _lint(bundle, json_file, run_options)
    if clipping is not None:
        if reference is not None or out is not None or parity:
            raise ArtifactError("check --clipping needs no model; omit --reference, --out and --parity")
        return _clipping(bundle, clipping, corpus, json_file, run_options)
    if reference is None:
        raise ArtifactError("check needs --reference MODEL, or one of --lint and --clipping TEXT")
    if parity:
        return _parity(bundle, reference, recipe, evaluation_text(corpus, gate), json_file, run_options)
    if json_file is not None or recipe is not None:
        raise ArtifactError(
            "check takes --json with --lint, --parity or --clipping only, and --recipe with --parity only"
        )
    from spike_export.cli.terminal.progress_display import ProgressDisplay
    from spike_export.pipeline.check import check as check_bundle
    from spike_export.report.check_table import print_check

    console = Console()
    named = bundle if bundle.name else bundle.absolute()
    path = out or named.parent / f"{named.name}.check.json"
    with ProgressDisplay(console, ["check"], quiet=run_options.quiet) as display, display.stage("check") as progress:
        result = check_bundle(
            bundle,
            reference,
            evaluation_text(corpus, gate),
            max_ppl_increase=gate.max_ppl_increase,
            max_kl=gate.max_kl,
            min_agreement=gate.min_agreement,
            out=path,
            progress=progress,
            overwrite=run_options.overwrite,
        )
    if not run_options.quiet:
        print_check(result, console)
        console.print(Text(f"check: {path}"), soft_wrap=True)
    return accuracy_verdict(result.passed)


def _parity(
    bundle: Path, reference: str, recipe: Path | None, text: "EvaluationText", out: Path | None, options: RunArguments
) -> int:
    from spike_export.cli.terminal.parity_table import print_parity
    from spike_export.cli.terminal.progress_display import ProgressDisplay
    from spike_export.pipeline.parity import parity

    console = Console()
    with ProgressDisplay(console, ["parity"], quiet=options.quiet) as display, display.stage("parity") as progress:
        result = parity(bundle, reference, recipe, text, out=out, progress=progress, overwrite=options.overwrite)
    if not options.quiet:
        print_parity(result, console)
    return DONE if result.passed else GATE_MISSED


def _clipping(bundle: Path, text: str, corpus: CorpusArguments, out: Path | None, options: RunArguments) -> int:
    from spike_export.calibration.corpus.files import CorpusOptions
    from spike_export.cli.terminal.clipping_table import print_clipping
    from spike_export.cli.terminal.progress_display import ProgressDisplay
    from spike_export.pipeline.clipping import clipping

    console, source = Console(), CorpusOptions(text, corpus.text_field, corpus.corpus_split, corpus.chat_template)
    with ProgressDisplay(console, ["clipping"], quiet=options.quiet) as display, display.stage("clipping") as progress:
        result = clipping(bundle, source, length=corpus.length, out=out, progress=progress, overwrite=options.overwrite)
    if not options.quiet:
        print_clipping(result, console)
    return DONE


def _lint(model: Path, json_file: Path | None, options: RunArguments) -> int:
    import json

    from spike_export.artifacts.atomic_write import require_file_name, write_text
    from spike_export.artifacts.ownership import require_replaceable
    from spike_export.cli.terminal.lint_table import print_lint
    from spike_export.engines.lint.linter import is_lint_document, lint_model

    if json_file is not None:
        require_file_name(json_file)
        require_replaceable(json_file, "the linter's result", is_lint_document, overwrite=options.overwrite)
    result = lint_model(model)
    if json_file is not None:
        write_text(json_file, json.dumps(result.document(), indent=2) + "\n")
    if not options.quiet:
        print_lint(result, Console())
    return DONE if result.passed else GATE_MISSED
