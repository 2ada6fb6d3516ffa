"""The command `spike-export`: the main job, and each stage alone.

Imports that take long (torch, transformers, onnx) stay inside the commands, so that `--help` answers at once.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import cyclopts
from cyclopts import App, Parameter
from rich.console import Console
from rich.text import Text

from spike_export.artifacts.errors import ArtifactError, SpikeExportError
from spike_export.artifacts.visible_text import visible
from spike_export.cli.arguments import (
    PROFILES_OF,
    BuildArguments,
    CorpusArguments,
    DtypeArguments,
    ExecutionArguments,
    FormatArguments,
    GateArguments,
    GraphArguments,
    QuantizationArguments,
    RunArguments,
    RuntimeArguments,
    SamplingArguments,
    values,
)

if TYPE_CHECKING:
    from spike_export.artifacts.recipe import Recipe
    from spike_export.calibration.methods.options import CalibrationOptions
    from spike_export.engines.build.reuse import ProvidedEngine
    from spike_export.engines.plan.build_options import BuildOptions
    from spike_export.export.cache_options import CacheOptions
    from spike_export.pipeline.evaluation_text import EvaluationText
    from spike_export.pipeline.job import Job
    from spike_export.pipeline.pipeline import Pipeline

DONE, GATE_MISSED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

Model = Annotated[str, Parameter(help="Local HF directory, .gguf file, or hub id.")]
Bundle = Annotated[Path, Parameter(help="Folder that export wrote.")]

app = App(
    name="spike-export",
    help="From a GLU language model to an INT8 engine that keeps its accuracy.",
    version=lambda: version("spike-export"),
    result_action="return_value",
    suppress_keyboard_interrupt=False,  # `run` says what is kept
)


def main() -> None:
    """Run the command line and leave with its exit code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run the command line; return 0 when done, 1 when a limit was missed, 2 for bad input, 130 when interrupted."""
    try:
        path = _config_path(arguments)
        if path:
            _require_toml(path)
        app.config = [cyclopts.config.Toml(path, must_exist=True)] if path else []
        code = app(arguments, exit_on_error=False, print_error=False)
    except cyclopts.CycloptsError as error:
        return _fail(str(error))
    except SpikeExportError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename or 'input or output'}: {error.strerror or error}")
    except KeyboardInterrupt:
        _say("interrupted; finished stages are kept, the same command goes on from there")
        return INTERRUPTED
    return code if isinstance(code, int) else DONE


def _config_path(arguments: Sequence[str]) -> Path | None:
    """Return the value of `--config`, which must be known before the options are read."""
    for index, argument in enumerate(arguments):
        if argument == "--config" and index + 1 < len(arguments):
            return Path(arguments[index + 1])
        if argument.startswith("--config="):
            return Path(argument.removeprefix("--config="))
    return None


def _require_toml(path: Path) -> None:
    """Refuse a configuration file that cannot be read, by its name, which the parser's own message lacks."""
    import tomllib

    try:
        tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"{path}: cannot read the configuration file: {error.strerror}") from error
    except ValueError as error:  # not UTF-8, or not TOML
        raise ArtifactError(f"{path}: not a TOML file ({error}); correct it, or leave --config out") from error


def _fail(message: str) -> int:
    _say(f"error: {visible(' '.join(message.split()))}")
    return BAD_INPUT


def _say(line: str) -> None:
    Console(stderr=True).print(Text(f"spike-export: {line}"), soft_wrap=True)


@app.default
def job(
    model: Model,
    /,
    *,
    out: Annotated[Path, Parameter(help="The engine plan to write; its description goes beside it.")],
    work_dir: Annotated[Path | None, Parameter(help="Where all else goes (default: OUT.run).")] = None,
    quantize: Annotated[bool, Parameter(help="Quantize; --no-quantize exports the model as it is.")] = True,
    corpus: CorpusArguments = CorpusArguments(),
    quantization: QuantizationArguments = QuantizationArguments(),
    dtype: DtypeArguments = DtypeArguments(),
    number_format: FormatArguments = FormatArguments(),
    execution: ExecutionArguments = ExecutionArguments(),
    graph: GraphArguments = GraphArguments(),
    gate: GateArguments = GateArguments(),
    build: BuildArguments = BuildArguments(),
    run_options: RunArguments = RunArguments(),
) -> int:
    """Calibrate, choose, export, check, build and report: the whole job."""
    from spike_export.pipeline.job import Job

    work = Job(
        model=model,
        work_dir=work_dir or out.parent / f"{out.name}.run",
        plan=out,
        calibration=_calibration_options(corpus, quantization, dtype),
        quantize=quantize,
        number_format=number_format.number_format,
        **_corpus_fields(corpus),
        cache=_cache_options(graph),
        logits=graph.logits,
        max_ppl_increase=gate.max_ppl_increase,
        build=_build_options(build),
        allow_fallback=build.allow_fallback,
        **_execution_fields(execution),
    )
    return _run_job(work, run_options)


def _run_job(work: "Job", options: RunArguments) -> int:
    from spike_export.pipeline.pipeline import stages_of
    from spike_export.report.check_table import print_check

    console = Console()
    pipeline = _open(work, options, stages_of(work), console)
    with pipeline.display:
        recipe = pipeline.calibrate() if work.quantize else None
        bundle = pipeline.export(recipe)
        check = pipeline.check(recipe, bundle)
        engine = pipeline.build(bundle) if check.passed else None
        report = pipeline.report(built=check.passed)
    if not options.quiet:
        print_check(check, console)
        if recipe is not None:
            _print_notes(recipe, console)
        if engine is not None:
            _print_build(engine, console)
        plans = engine.plans if engine else ("not built: the accuracy limit was missed",)
        for name, place in (*(("plan", plan) for plan in plans), ("bundle", bundle), ("report", report)):
            console.print(Text(f"{name}: {place}"), soft_wrap=True)
    if engine is None:
        return _accuracy_verdict(check.passed)
    return _plan_verdict(engine, work.allow_fallback)


def _accuracy_verdict(passed: bool) -> int:
    if passed:
        return DONE
    _say("the accuracy limit was missed; see the check")
    return GATE_MISSED


def _print_build(engine: "ProvidedEngine", console: Console) -> None:
    for warning in engine.warnings:
        console.print(Text(f"the compiler warns: {visible(' '.join(warning.split()))}"), soft_wrap=True)
    console.print(Text(f"plan {engine.note}"), soft_wrap=True)


def _plan_verdict(engine: "ProvidedEngine", allow_fallback: bool) -> int:
    if engine.complaint is None or allow_fallback:
        return DONE
    _say(f"{engine.complaint}; accept it: --allow-fallback")
    return GATE_MISSED


def _open(work: "Job", options: RunArguments, stages: Sequence[str], console: Console) -> "Pipeline":
    from spike_export.artifacts.atomic_write import require_writable
    from spike_export.pipeline.job import require_buildable, require_length, require_room

    # Check the last stage's requirements before the first stage starts: a run can take hours.
    if work.plan:
        from spike_export.engines.build.reuse import require_own_place

        require_own_place(work.plan, work.build.split)
        require_buildable(work.build, work.number_format)
        require_writable(work.plan.parent)
        if work.build.timing_cache:
            require_writable(work.build.timing_cache.parent)
    require_writable(work.work_dir)
    from spike_export.calibration.corpus.chat import rendered
    from spike_export.calibration.methods.transform_choice import require_rotation
    from spike_export.checkpoint.opening import open_checkpoint
    from spike_export.cli.terminal.progress_display import ProgressDisplay
    from spike_export.engines.plan.build_profiles import resolve_limits
    from spike_export.export.cache_options import require_capacity
    from spike_export.pipeline.pipeline import BUNDLE, Pipeline
    from spike_export.pipeline.run_directory import RunDirectory

    read = work.read_corpus()  # a bad corpus is reported before the model is opened
    checkpoint = open_checkpoint(work.model)
    if BUNDLE in stages:
        require_capacity(work.cache, checkpoint.config)
        require_room(work.calibration.length, work.cache.capacity)
    require_length(work.calibration.length, checkpoint)
    if work.plan:
        resolve_limits(work.build, 0, checkpoint.config.max_position_embeddings, work.cache.capacity)
    if work.quantize:
        require_rotation(work.calibration, checkpoint.config)
    corpus = rendered(read, checkpoint.tokenizer)
    display = ProgressDisplay(console, stages, quiet=options.quiet)
    return Pipeline(work, checkpoint, RunDirectory(work.work_dir, options.force), display, corpus)


def _calibration_options(
    corpus: CorpusArguments, quantization: QuantizationArguments, dtype: DtypeArguments
) -> "CalibrationOptions":
    from spike_export.calibration.methods.options import CalibrationOptions

    return CalibrationOptions(
        samples=corpus.samples,
        length=corpus.length,
        seed=corpus.seed,
        windows=corpus.windows,
        dtype=dtype.dtype,
        **values(quantization),
    )


def _corpus_fields(corpus: CorpusArguments) -> dict[str, Any]:
    """Return what a job knows of its corpus."""
    names = ("corpus", "text_field", "corpus_split", "chat_template")
    return {name: getattr(corpus, name) for name in names}


def _execution_fields(execution: ExecutionArguments) -> dict[str, Any]:
    return {
        "devices": execution.device,
        "compute_dtype": execution.compute_dtype,
        "residency": execution.layers,
    }


def _cache_options(graph: GraphArguments) -> "CacheOptions":
    from spike_export.export.cache_options import CacheOptions

    return CacheOptions(graph.kv_cache, graph.capacity)


def _build_options(build: BuildArguments) -> "BuildOptions":
    from spike_export.engines.plan.build_options import BatchRange, BuildOptions

    return BuildOptions(
        backend=build.backend,
        targets=build.target,
        profiles=PROFILES_OF[build.profiles],
        split=build.profiles == "split",
        batch=BatchRange(1, build.typical_batch, build.max_batch),
        capacity=build.plan_capacity,
        max_context=build.max_context,
        typical_prompt=build.typical_prompt,
        max_prompt=build.max_prompt,
        optimization_level=build.optimization_level,
        refit=build.refit,
        strip_weights=build.strip_weights,
        weight_streaming=build.weight_streaming,
        hardware_compatible=build.hardware_compatible,
        version_compatible=build.version_compatible,
        timing_cache=build.timing_cache,
        ignore_memory=build.ignore_memory,
    )


@app.command
def calibrate(
    model: Model,
    /,
    *,
    work_dir: Annotated[Path, Parameter(help="Where statistics and recipe go.")],
    corpus: CorpusArguments = CorpusArguments(),
    quantization: QuantizationArguments = QuantizationArguments(),
    dtype: DtypeArguments = DtypeArguments(),
    execution: ExecutionArguments = ExecutionArguments(),
    shard: Annotated[
        str | None, Parameter(help="i/n: measure only the i-th of n parts of the windows, for `merge`.")
    ] = None,
    run_options: RunArguments = RunArguments(),
) -> int:
    """Measure activation spikes, choose prefix, smoothing and modules, write the recipe."""
    from spike_export.calibration.statistics.partial_statistics import parse_shard, shard_samples
    from spike_export.pipeline.job import Job
    from spike_export.pipeline.pipeline import BUNDLE, stages_of

    options = _calibration_options(corpus, quantization, dtype)
    part = parse_shard(shard) if shard else None
    if part:
        shard_samples(options.samples, part)  # an empty shard is refused before the model is opened
    work = Job(
        model, work_dir, calibration=options, shard=part, **_corpus_fields(corpus), **_execution_fields(execution)
    )
    console = Console()
    stages = stages_of(work)
    pipeline = _open(work, run_options, stages[: stages.index(BUNDLE)], console)
    if part:
        with pipeline.display:
            pipeline.measure()
        if not run_options.quiet:
            console.print(Text(f"statistics of shard {shard}: {work_dir / 'spikes.json'}"), soft_wrap=True)
        return DONE
    with pipeline.display:
        recipe = pipeline.calibrate()
    if not run_options.quiet:
        prefix = f"prefix {list(recipe.prefix_ids)} {recipe.prefix.text!r}" if recipe.prefix else "no prefix"
        counts: Counter[str] = Counter({recipe.scheme.unquantized: 0})
        counts.update(recipe.modules[name].precision for name in recipe.kept_linears())
        total = len(recipe.modules)
        kept = ", ".join(f"{count} of {total} linears in {precision}" for precision, count in counts.items())
        console.print(Text(f"{kept}, {prefix}\nrecipe: {work_dir / 'recipe.json'}"), soft_wrap=True)
        _print_notes(recipe, console)
    return DONE


def _print_notes(recipe: "Recipe", console: Console) -> None:
    for note in recipe.notes():
        console.print(Text(f"note: {note}"), soft_wrap=True)


@app.command
def merge(
    shards: Annotated[tuple[Path, ...], Parameter(help="Work directories of the shards, all of them, in any order.")],
    /,
    *,
    work_dir: Annotated[Path, Parameter(help="Where calibrate is to go on from the merged statistics.")],
    run_options: RunArguments = RunArguments(),
) -> int:
    """Merge the statistics that `calibrate --shard` measured; `calibrate` without it goes on from there."""
    from spike_export.pipeline.shard_merge import merge_into

    samples = merge_into(work_dir, shards)
    if not run_options.quiet:
        Console().print(Text(f"{samples} windows of {len(shards)} shards: {work_dir / 'spikes.json'}"), soft_wrap=True)
    return DONE


@app.command
def inspect(
    target: Annotated[Path, Parameter(help="A plan, a bundle's folder, or the work directory of a run.")],
    /,
    *,
    explain: Annotated[
        tuple[str, ...],
        Parameter(help="Of a run: module, e.g. model.layers.11.mlp.down_proj or 11.mlp.down_proj; repeatable."),
    ] = (),
    as_json: Annotated[bool, Parameter(name="--json", negative="", help="Print JSON instead of tables.")] = False,
    run_options: RunArguments = RunArguments(),
) -> int:
    """Show what a plan really runs, what a bundle holds, or what a run decided and why."""
    from spike_export.cli.inspection.target import inspect_target

    return DONE if inspect_target(target, explain, as_json, Console()) else GATE_MISSED


@app.command
def export(
    model: Model,
    /,
    *,
    out: Annotated[Path, Parameter(help="The bundle's folder; a previous bundle there is replaced.")],
    recipe: Annotated[Path | None, Parameter(help="Recipe that calibrate wrote, edited or not.")] = None,
    quantize: Annotated[bool, Parameter(help="Quantize; --no-quantize needs no recipe.")] = True,
    dtype: Annotated[
        DtypeArguments | None, Parameter(help="Default: the recipe's precision, or float16 without one.")
    ] = None,
    graph: GraphArguments = GraphArguments(),
    number_format: FormatArguments = FormatArguments(),
    prefix_in: Annotated[
        Literal["cache", "attention"],
        Parameter(
            help="Where the prefix lives: in the cache, or before it, in attention, at the cost of a copy of the cache "
            "per call: then onnxruntime-genai can run the bundle."
        ),
    ] = "cache",
    run_options: RunArguments = RunArguments(),
) -> int:
    """Write the ONNX bundle of a recipe."""
    from spike_export.artifacts.errors import RecipeError

    if quantize == (recipe is None):
        raise RecipeError(
            "export needs --recipe FILE, or --no-quantize to export the model as it is"
            if recipe is None
            else "--recipe and --no-quantize contradict each other; give one"
        )
    from spike_export.artifacts.recipe import load_recipe
    from spike_export.checkpoint.opening import open_checkpoint
    from spike_export.cli.terminal.progress_display import ProgressDisplay
    from spike_export.export.bundle import ExportOptions, export_bundle
    from spike_export.pipeline.job import require_bundle_or_nothing, require_quantized

    require_quantized(number_format.number_format, quantize)
    plan = load_recipe(recipe) if recipe else None
    wanted = ExportOptions(
        dtype.dtype if dtype else plan.scheme.unquantized if plan else "float16",
        number_format=number_format.number_format,
        cache=_cache_options(graph),
        prefix_in=prefix_in,
        logits=graph.logits,
    )
    require_bundle_or_nothing(out)
    checkpoint = open_checkpoint(model)
    console = Console()
    with (
        ProgressDisplay(console, ["bundle"], quiet=run_options.quiet) as display,
        display.stage("bundle") as progress,
    ):
        export_bundle(checkpoint, plan, wanted, out, progress)
    if not run_options.quiet:
        console.print(Text(f"bundle: {out}"), soft_wrap=True)
    return DONE


@app.command
def check(
    bundle: Annotated[Path, Parameter(help="Folder that export wrote; with --lint also any .onnx file.")],
    /,
    *,
    reference: Annotated[str | None, Parameter(help="The model the bundle was made of; not with --lint.")] = None,
    lint: Annotated[
        bool, Parameter(negative="", help="Look for what TensorRT and ONNX Runtime refuse or compute slowly.")
    ] = False,
    json_file: Annotated[Path | None, Parameter(name="--json", help="With --lint: write the findings there.")] = None,
    out: Annotated[Path | None, Parameter(help="Default: BUNDLE.check.json, beside the bundle.")] = None,
    corpus: CorpusArguments = CorpusArguments(),
    gate: GateArguments = GateArguments(),
    run_options: RunArguments = RunArguments(),
) -> int:
    """Compare a bundle with the unquantized model: perplexity, top-1 agreement, KL divergence. Or lint its graph."""
    if lint:
        if reference is not None or out is not None:
            raise ArtifactError("check --lint looks at the graph alone; leave --reference and --out away")
        return _lint(bundle, json_file, run_options)
    if reference is None or json_file is not None:
        wrong = "needs --reference MODEL, or --lint" if reference is None else "writes --json with --lint only"
        raise ArtifactError(f"check {wrong}")
    from spike_export.artifacts.atomic_write import require_file_name
    from spike_export.artifacts.check_document import save_check
    from spike_export.cli.terminal.progress_display import ProgressDisplay
    from spike_export.pipeline.bundle_check import check_bundle
    from spike_export.pipeline.job import require_limit
    from spike_export.report.check_table import print_check

    require_limit(gate.max_ppl_increase)
    console = Console()
    named = bundle if bundle.name else bundle.absolute()
    path = out or named.parent / f"{named.name}.check.json"
    require_file_name(path)
    with ProgressDisplay(console, ["check"], quiet=run_options.quiet) as display, display.stage("check") as progress:
        result = check_bundle(bundle, reference, _evaluation_text(corpus), progress).gated(gate.max_ppl_increase)
        save_check(result, path)
    if not run_options.quiet:
        print_check(result, console)
        console.print(Text(f"check: {path}"), soft_wrap=True)
    return _accuracy_verdict(result.passed)


def _evaluation_text(corpus: CorpusArguments) -> "EvaluationText":
    from spike_export.pipeline.evaluation_text import EvaluationText

    return EvaluationText(**values(corpus))


def _lint(model: Path, json_file: Path | None, options: RunArguments) -> int:
    import json

    from spike_export.artifacts.atomic_write import write_text
    from spike_export.cli.terminal.lint_table import print_lint
    from spike_export.engines.lint.linter import lint_model

    result = lint_model(model)
    if json_file is not None:
        write_text(json_file, json.dumps(result.document(), indent=2) + "\n")
    if not options.quiet:
        print_lint(result, Console())
    return DONE if result.passed else GATE_MISSED


@app.command
def build(
    bundle: Bundle,
    /,
    *,
    out: Annotated[Path, Parameter(help="The engine plan to write; its description goes beside it.")],
    build_options: BuildArguments = BuildArguments(),
    run_options: RunArguments = RunArguments(),
) -> int:
    """Build the engine plan of a bundle, and prove from the plan in which precision each module runs."""
    from spike_export.cli.terminal.progress_display import ProgressDisplay
    from spike_export.engines.build.reuse import provide_engine

    console = Console()
    with ProgressDisplay(console, ["plan"], quiet=run_options.quiet) as display, display.stage("plan") as progress:
        engine = provide_engine(bundle, out, _build_options(build_options), progress, force=run_options.force)
    if not run_options.quiet:
        _print_build(engine, console)
        for plan, sidecar in zip(engine.plans, engine.sidecars, strict=True):
            console.print(Text(f"plan: {plan} ({sidecar.backend.reason})"), soft_wrap=True)
    return _plan_verdict(engine, build_options.allow_fallback)


@app.command
def generate(
    path: Annotated[Path, Parameter(name="BUNDLE|PLAN", help="Folder that export wrote, or an engine plan.")],
    /,
    *,
    prompt: Annotated[
        tuple[str, ...], Parameter(negative="", help="Text to go on from; repeat for several, decoded together.")
    ] = (),
    prompt_file: Annotated[Path | None, Parameter(help="UTF-8 text to go on from.")] = None,
    chat: Annotated[
        bool, Parameter(negative="", help="Prompts are a user's messages: render them by the chat template.")
    ] = False,
    system: Annotated[str | None, Parameter(help="With --chat: the system's message.")] = None,
    sampling: SamplingArguments = SamplingArguments(),
    provider: Annotated[
        Literal["cpu", "cuda"] | None, Parameter(help="Where ONNX Runtime computes; default: cpu.")
    ] = None,
    threads: Annotated[int | None, Parameter(help="Of ONNX Runtime, for one operator; default: one per core.")] = None,
    bundle: Annotated[
        Path | None, Parameter(help="What a plan was built from; default: PLAN.run/bundle, where the main job puts it.")
    ] = None,
    rebuild: Annotated[
        bool, Parameter(negative="", help="Build a plan again that is of another GPU, version or bundle by now.")
    ] = False,
    also: Annotated[
        tuple[Path, ...],
        Parameter(
            name="--plan-also",
            negative="",
            help="Another plan of the same bundle, built for another context; repeat for several. A batch runs in the "
            "one with the least context that has room for it.",
        ),
    ] = (),
    runtime: RuntimeArguments = RuntimeArguments(),
    as_json: Annotated[
        bool, Parameter(name="--json", negative="", help="Print JSON: text, tokens, finish reason, log-probabilities.")
    ] = False,
    config: Annotated[Path | None, Parameter(help="TOML file with any of these options.", group="Run")] = None,
) -> int:
    """Generate text with a bundle in ONNX Runtime or a plan in TensorRT, and write it as it comes."""
    from spike_export.cli.generate import generate as write_generated
    from spike_export.cli.generate import option_changes, read_prompts, runtime_options

    prompts, changes = read_prompts(prompt, prompt_file, chat, system), option_changes(sampling)
    if "logprobs" in changes and not as_json:
        raise ArtifactError("generate writes log-probabilities with --json only; add it, or leave --logprobs out")
    from spike_export.cli.terminal.progress_display import ProgressDisplay
    from spike_export.engines.engine import Engine

    # Standard output is the text's.
    display = ProgressDisplay(Console(stderr=True), ["plan"], quiet=not rebuild)
    try:
        with display, display.stage("plan") as progress:
            engine = Engine.open(
                [path, *also],
                threads=threads,
                provider=provider,
                bundle=bundle,
                rebuild=rebuild,
                runtime=runtime_options(runtime),
                progress=progress,
            )
        with engine:
            write_generated(engine, prompts, changes, as_json=as_json)
    except KeyboardInterrupt:
        return INTERRUPTED
    return DONE


@app.command
def report(
    run_directory: Annotated[Path, Parameter(help="Work directory of a run.")],
    /,
    *,
    engine: Annotated[Path | None, Parameter(help="engine.json of the plan, when it lies elsewhere.")] = None,
    run_options: RunArguments = RunArguments(),
) -> int:
    """Write the HTML page of a run."""
    from spike_export.report.page import write_report

    page = write_report(run_directory, engine=engine)
    if not run_options.quiet:
        Console().print(Text(f"report: {page}"), soft_wrap=True)
    return DONE
