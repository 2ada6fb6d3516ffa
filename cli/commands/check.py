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
    continuations: Annotated[
        int | None,
        Parameter(
            help="Write so many tokens behind four prompts, by the bundle and by the model; show where they part."
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        Parameter(name="--json", help="With --lint, --parity, --clipping or --continuations: file for the result."),
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
    mode = _mode(lint=lint, parity=parity, clipping=clipping is not None, continuations=continuations is not None)
    _require_fitting(mode, reference, recipe, json_file, out)
    text = evaluation_text(corpus, gate)
    if lint:
        return _lint(bundle, json_file, run_options)
    if clipping is not None:
        return _clipping(bundle, clipping, corpus, json_file, run_options)
    assert reference is not None, "was required"
    if parity:
        return _parity(bundle, reference, recipe, text, json_file, run_options)
    if continuations is not None:
        return _continuations(bundle, reference, continuations, text, json_file, run_options)
    return _accuracy(bundle, reference, text, gate, out, run_options)


def _mode(**given: bool) -> str | None:
    """Return the option that says what to do other than measure the accuracy, or None.

    Raises:
        ArtifactError: There are several.
    """
    modes = [f"--{name}" for name, there in given.items() if there]
    if len(modes) > 1:
        raise ArtifactError(f"check does one thing at a time; give either {' or '.join(modes)}")
    return modes[0] if modes else None


def _require_fitting(
    mode: str | None, reference: str | None, recipe: Path | None, json_file: Path | None, out: Path | None
) -> None:
    """Refuse options that have no meaning for what is to be done.

    Raises:
        ArtifactError: Names the option.
    """
    without_model = mode in ("--lint", "--clipping")
    if without_model and reference is not None:
        raise ArtifactError(f"check {mode} needs no model; omit --reference")
    if not without_model and reference is None:
        raise ArtifactError("check needs --reference MODEL, or one of --lint and --clipping TEXT")
    if mode is not None and out is not None:
        raise ArtifactError(f"check {mode} writes its result with --json FILE; omit --out")
    if mode is None and json_file is not None:
        raise ArtifactError(
            "check writes the accuracy with --out FILE, and --json is for --lint, --parity, --clipping, --continuations"
        )
    if mode != "--parity" and recipe is not None:
        raise ArtifactError("check takes --recipe with --parity only; omit --recipe")


def _accuracy(
    bundle: Path, reference: str, text: "EvaluationText", gate: GateArguments, out: Path | None, options: RunArguments
) -> int:
    from spike_export.cli.terminal.progress_display import ProgressDisplay
    from spike_export.pipeline.check import check as check_bundle
    from spike_export.report.check_table import print_check

    console = Console()
    named = bundle if bundle.name else bundle.absolute()
    path = out or named.parent / f"{named.name}.check.json"
    with ProgressDisplay(console, ["check"], quiet=options.quiet) as display, display.stage("check") as progress:
        result = check_bundle(
            bundle,
            reference,
            text,
            max_ppl_increase=gate.max_ppl_increase,
            max_kl=gate.max_kl,
            min_agreement=gate.min_agreement,
            out=path,
            progress=progress,
            overwrite=options.overwrite,
        )
    if not options.quiet:
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


def _continuations(
    bundle: Path, reference: str, tokens: int, text: "EvaluationText", out: Path | None, options: RunArguments
) -> int:
    from spike_export.cli.terminal.continuations_text import print_continuations
    from spike_export.cli.terminal.progress_display import ProgressDisplay
    from spike_export.pipeline.continuations import continuations

    console, name = Console(), "continuations"
    with ProgressDisplay(console, [name], quiet=options.quiet) as display, display.stage(name) as progress:
        found = continuations(bundle, reference, tokens, text, out=out, progress=progress, overwrite=options.overwrite)
    if not options.quiet:
        print_continuations(found, console)
    return DONE


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
