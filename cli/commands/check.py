"""`spike-export check BUNDLE`: its accuracy, its parity step by step, or what the linter finds in its graph."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.console import Console

from spike_export.artifacts.errors import ArtifactError
from spike_export.cli.arguments import (
    AsJson,
    ClusterArguments,
    CorpusArguments,
    GateArguments,
    RunArguments,
    ThreadArguments,
)
from spike_export.cli.exit_codes import DONE, GATE_MISSED
from spike_export.cli.invocation import record
from spike_export.cli.options import cluster_options, evaluation_text, use_threads
from spike_export.cli.terminal.lines import print_lines
from spike_export.cli.terminal.output import Output
from spike_export.cli.verdicts import accuracy_verdict

if TYPE_CHECKING:
    from spike_export.pipeline.cluster.cluster_options import ClusterOptions
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
    tasks: Annotated[
        str | None,
        Parameter(
            help="Tasks of lm-evaluation-harness by name, or YAML files, separated by commas: accuracy and flips of "
            "the bundle beside the unquantized model."
        ),
    ] = None,
    items: Annotated[int | None, Parameter(help="With --tasks: only so many items of each task.")] = None,
    max_flips: Annotated[
        float | None,
        Parameter(help="With --tasks: largest share of answers that may turn right or wrong, such as 0.05."),
    ] = None,
    out: Annotated[
        Path | None,
        Parameter(
            help="JSON file for the result (default: of the accuracy BUNDLE.check.json, of --tasks BUNDLE.tasks.json, "
            "else none)."
        ),
    ] = None,
    as_json: AsJson = False,
    corpus: CorpusArguments = CorpusArguments(),
    gate: GateArguments = GateArguments(),
    cluster: ClusterArguments = ClusterArguments(),
    threads: ThreadArguments = ThreadArguments(),
    run_options: RunArguments = RunArguments(),
) -> int:
    """Compare a bundle with the unquantized model (perplexity, agreement, KL), or --parity, --clipping, --lint."""
    use_threads(threads)
    mode = _mode(
        lint=lint,
        parity=parity,
        clipping=clipping is not None,
        continuations=continuations is not None,
        tasks=tasks is not None,
    )
    _require_fitting(mode, reference, recipe)
    if tasks is None and (items is not None or max_flips is not None):
        raise ArtifactError("check takes --items and --max-flips with --tasks only; omit them")
    spread = cluster_options(cluster)
    if mode is not None and spread is not None:
        raise ArtifactError(f"check {mode} runs in one process; omit --ray")
    asked = _Asked(bundle, reference or "", evaluation_text(corpus, gate), out, run_options, as_json)
    if lint:
        code = _lint(asked)
    elif clipping is not None:
        code = _clipping(asked, clipping, corpus)
    elif parity:
        code = _parity(asked, recipe)
    elif continuations is not None:
        code = _continuations(asked, continuations)
    elif tasks is not None:
        code = _tasks(asked, tasks, items, max_flips)
    else:
        code = _accuracy(asked, gate, spread)
    record(bundle.absolute().parent)
    return code


@dataclass(frozen=True)
class _Asked:
    """What every kind of check is told."""

    bundle: Path
    reference: str
    text: "EvaluationText"
    out: Path | None
    options: RunArguments
    as_json: bool

    @property
    def output(self) -> Output:
        """Where progress and result go."""
        return Output(self.options.quiet, self.as_json)

    @property
    def pair(self) -> tuple[Path, str]:
        """The bundle and its model."""
        return self.bundle, self.reference


def _mode(**given: bool) -> str | None:
    """Return the option that says what to do other than measure the accuracy, or None.

    Raises:
        ArtifactError: There are several.
    """
    modes = [f"--{name}" for name, there in given.items() if there]
    if len(modes) > 1:
        raise ArtifactError(f"check does one thing at a time; give either {' or '.join(modes)}")
    return modes[0] if modes else None


def _require_fitting(mode: str | None, reference: str | None, recipe: Path | None) -> None:
    """Refuse options that have no meaning for what is to be done.

    Raises:
        ArtifactError: Names the option.
    """
    without_model = mode in ("--lint", "--clipping")
    if without_model and reference is not None:
        raise ArtifactError(f"check {mode} needs no model; omit --reference")
    if not without_model and reference is None:
        raise ArtifactError("check needs --reference MODEL, or one of --lint and --clipping TEXT")
    if mode != "--parity" and recipe is not None:
        raise ArtifactError("check takes --recipe with --parity only; omit --recipe")


def _accuracy(asked: _Asked, gate: GateArguments, cluster: "ClusterOptions | None") -> int:
    from spike_export.pipeline.checking.check import check as check_bundle
    from spike_export.report.check_table import print_check

    bundle, options = asked.bundle, asked.options
    named = bundle if bundle.name else bundle.absolute()
    path = asked.out or named.parent / f"{named.name}.check.json"
    with asked.output.progress("check") as progress:
        result = check_bundle(
            *asked.pair,
            asked.text,
            max_ppl_increase=gate.max_ppl_increase,
            max_kl=gate.max_kl,
            min_agreement=gate.min_agreement,
            cluster=cluster,
            out=path,
            progress=progress,
            force=options.force,
            overwrite=options.overwrite,
        )

    def show(console: Console) -> None:
        print_check(result, console)
        print_lines(console, f"check: {path}")

    asked.output.result(result.model_dump(mode="json"), show)
    return accuracy_verdict(result.passed)


def _parity(asked: _Asked, recipe: Path | None) -> int:
    from spike_export.cli.terminal.parity_table import print_parity
    from spike_export.pipeline.checking.parity import parity

    with asked.output.progress("parity") as progress:
        overwrite = asked.options.overwrite
        result = parity(*asked.pair, recipe, asked.text, out=asked.out, progress=progress, overwrite=overwrite)
    asked.output.result(result.document(), partial(print_parity, result))
    return DONE if result.passed else GATE_MISSED


def _continuations(asked: _Asked, tokens: int) -> int:
    from spike_export.cli.terminal.continuations_text import print_continuations
    from spike_export.pipeline.checking.continuations import continuations

    with asked.output.progress("continuations") as progress:
        overwrite = asked.options.overwrite
        found = continuations(*asked.pair, tokens, asked.text, out=asked.out, progress=progress, overwrite=overwrite)
    asked.output.result(found.document(), partial(print_continuations, found))
    return DONE


def _tasks(asked: _Asked, tasks: str, items: int | None, max_flips: float | None) -> int:
    from spike_export.artifacts.results.task_document import task_place
    from spike_export.cli.terminal.task_table import print_task_accuracy
    from spike_export.pipeline.checking.tasks import task_accuracy

    place = asked.out or task_place(asked.bundle)
    with asked.output.progress("tasks") as progress:
        found = task_accuracy(
            *asked.pair,
            [name for each in tasks.split(",") if (name := each.strip())],
            items=items,
            max_flips=max_flips,
            out=place,
            progress=progress,
            overwrite=asked.options.overwrite,
        )

    def show(console: Console) -> None:
        print_task_accuracy(found, console)
        print_lines(console, f"tasks: {place}")

    asked.output.result(found.document(), show)
    return accuracy_verdict(found.passed)


def _clipping(asked: _Asked, text: str, corpus: CorpusArguments) -> int:
    from spike_export.calibration.corpus.files import CorpusOptions
    from spike_export.cli.terminal.clipping_table import print_clipping
    from spike_export.pipeline.checking.clipping import clipping

    source = CorpusOptions(text, corpus.text_field, corpus.corpus_split, corpus.chat_template)
    with asked.output.progress("clipping") as progress:
        overwrite = asked.options.overwrite
        result = clipping(
            asked.bundle, source, length=corpus.length, out=asked.out, progress=progress, overwrite=overwrite
        )
    asked.output.result(result.document(), partial(print_clipping, result))
    return DONE


def _lint(asked: _Asked) -> int:
    from spike_export.cli.terminal.lint_text import print_lint
    from spike_export.engines.lint.linter import LINT_KEYS, lint_model
    from spike_export.pipeline.checking.result_file import ResultFile

    file = ResultFile.at(asked.out, "the linter's result", *LINT_KEYS, overwrite=asked.options.overwrite)
    result = lint_model(asked.bundle)
    file.write(result.document())
    asked.output.result(result.document(), partial(print_lint, result))
    return DONE if result.passed else GATE_MISSED
