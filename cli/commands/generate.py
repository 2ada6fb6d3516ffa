"""`spike-export generate BUNDLE|PLAN`: text that follows prompts."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from rich.console import Console

from spike_export.artifacts.errors import ArtifactError, EngineError
from spike_export.artifacts.files.documents import read_document
from spike_export.cli.arguments import (
    LoweringArguments,
    ProgramArguments,
    RuntimeArguments,
    SamplingArguments,
    ThreadArguments,
    values,
)
from spike_export.cli.exit_codes import DONE, INTERRUPTED
from spike_export.cli.options import use_threads

if TYPE_CHECKING:
    from spike_export.engines.generation.prompt_tokens import Prompt
    from spike_export.engines.tensorrt.engines import RuntimeOptions


def generate(
    path: Annotated[Path, Parameter(name="BUNDLE|PLAN", help="Folder that export wrote, or an engine plan.")],
    /,
    *,
    prompt: Annotated[
        tuple[str, ...],
        Parameter(negative="", help="Text to continue; repeat the option to decode several prompts together."),
    ] = (),
    prompt_file: Annotated[Path | None, Parameter(help="File with UTF-8 text to continue.")] = None,
    chat: Annotated[
        bool, Parameter(negative="", help="The prompts are messages of a user; render them with the chat template.")
    ] = False,
    system: Annotated[str | None, Parameter(help="With --chat: the system message.")] = None,
    sampling: SamplingArguments = SamplingArguments(),
    provider: Annotated[
        Literal["cpu", "cuda"] | None, Parameter(help="Device on which ONNX Runtime computes (default: cpu).")
    ] = None,
    threads: ThreadArguments = ThreadArguments(),
    lowering: LoweringArguments = LoweringArguments(),
    speculate: Annotated[
        Literal["off", "ngram"],
        Parameter(
            help="Draft the next tokens from the text so far, and verify them in one call: faster where an answer "
            "repeats its prompt. For one prompt over a static cache."
        ),
    ] = "off",
    bundle: Annotated[
        Path | None,
        Parameter(help="Bundle that the plan was built from (default: PLAN.run/bundle, where the main job writes it)."),
    ] = None,
    rebuild: Annotated[
        bool, Parameter(negative="", help="Build the plan again if its GPU, version or bundle has changed.")
    ] = False,
    also: Annotated[
        tuple[Path, ...],
        Parameter(
            name="--plan-also",
            negative="",
            help="Another plan of the same bundle with another context; repeat the option for several. Each batch runs "
            "in the plan with the least context that has room.",
        ),
    ] = (),
    runtime: RuntimeArguments = RuntimeArguments(),
    as_json: Annotated[
        bool, Parameter(name="--json", negative="", help="Print JSON: text, tokens, finish reason, log-probabilities.")
    ] = False,
    run_options: ProgramArguments = ProgramArguments(),
) -> int:
    """Generate text with a bundle in ONNX Runtime or a plan in TensorRT; the text appears as it is generated."""
    use_threads(threads)
    prompts, changes = read_prompts(prompt, prompt_file, chat, system), option_changes(sampling)
    if "logprobs" in changes and not as_json:
        raise ArtifactError("generate writes log-probabilities with --json only; add --json, or leave --logprobs out")
    from spike_export.cli.terminal.generated_text import write_generated
    from spike_export.cli.terminal.progress_display import ProgressDisplay
    from spike_export.engines.engine import Engine
    from spike_export.engines.plan_runtime import is_plan

    # Standard output is the text's.
    display = ProgressDisplay(Console(stderr=True), ["plan"], quiet=not (rebuild and is_plan(path)))
    try:
        with display, display.stage("plan") as progress:
            engine = Engine.open(
                [path, *also],
                threads=threads.threads,
                lowering=lowering.lowering,
                weights_copy=lowering.weights_copy,
                speculate=speculate,
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


def read_prompts(prompts: Sequence[str], file: Path | None, chat: bool, system: str | None) -> list["Prompt"]:
    """Return the prompts of the command line, as chats where asked for.

    Raises:
        EngineError: There is none, or the file is not text.
    """
    texts = list(prompts)
    if file is not None:
        try:
            texts.append(read_document(file))
        except UnicodeDecodeError as error:
            raise EngineError(f"{file}: not UTF-8 text; convert it") from error
    if not texts:
        raise EngineError("generate needs --prompt TEXT or --prompt-file FILE")
    if system is not None and not chat:
        raise EngineError("--system is a message of a chat; add --chat, or leave it out")
    if not chat:
        return list(texts)
    before = [] if system is None else [{"role": "system", "content": system}]
    return [[*before, {"role": "user", "content": text}] for text in texts]


def option_changes(arguments: SamplingArguments) -> dict[str, Any]:
    """Return the options that were given.

    One that only sampling looks at asks for sampling, unless it is forbidden.
    """
    given = {name: value for name, value in values(arguments).items() if value is not None and value != ()}
    stops = given.pop("stop", None)
    if stops:
        given["stop_strings"] = stops
    if given.keys() & {"temperature", "top_k", "top_p", "min_p", "seed"}:
        given.setdefault("do_sample", True)
    return given


def runtime_options(arguments: RuntimeArguments) -> "RuntimeOptions | None":
    """Return how plans are run; None where nothing was said of it.

    Raises:
        EngineError: The weight budget is negative.
    """
    given = {name: value for name, value in values(arguments).items() if value is not None}
    if not given:
        return None
    from spike_export.engines.tensorrt.engines import RuntimeOptions

    return RuntimeOptions(**given)
