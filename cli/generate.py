"""Text on the terminal as it is generated, or all of it as JSON."""

import codecs
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from spike_export.artifacts.errors import EngineError
from spike_export.cli.arguments import RuntimeArguments, SamplingArguments, values

if TYPE_CHECKING:
    from spike_export.engines.engine import Engine
    from spike_export.engines.generation.prompt_tokens import Prompt
    from spike_export.engines.tensorrt.engines import RuntimeOptions


def generate(
    engine: "Engine", prompts: Sequence["Prompt"], changes: dict[str, Any], *, as_json: bool, out: IO[str] | None = None
) -> None:
    """Write what follows each prompt: one prompt's text as it comes, several one after another, or JSON.

    Characters that the output's encoding lacks are replaced in text, and written as JSON's own escapes there.

    Args:
        engine: A runtime with its tokenizer.
        prompts: All are decoded together.
        changes: Options that differ from the bundle's own.
        as_json: Write a list of objects with text, tokens, finish reason and log-probabilities.
        out: Where to; standard output when omitted.

    Raises:
        EngineError: A prompt or an option cannot be used, or the runtime fails.
    """
    out = out or sys.stdout
    if as_json:
        results = [asdict(result) for result in engine.generate(prompts, **changes)]
        holds_all = codecs.lookup(getattr(out, "encoding", None) or "utf-8").name == "utf-8"
        out.write(json.dumps(results, ensure_ascii=not holds_all, indent=2) + "\n")
        return
    if isinstance(out, io.TextIOWrapper):
        out.reconfigure(errors="replace")
    if len(prompts) == 1:
        for piece in engine.stream(prompts, **changes):
            _write(out, piece.text)
        out.write("\n")
        return
    texts = ["" for _ in prompts]
    for piece in engine.stream(prompts, **changes):
        texts[piece.row] += piece.text
    for row, text in enumerate(texts):
        _write(out, f"{'' if row == 0 else chr(10)}[{row}]{text}\n")


def read_prompts(prompts: Sequence[str], file: Path | None, chat: bool, system: str | None) -> list["Prompt"]:
    """Return the prompts of the command line, as chats where asked for.

    Raises:
        EngineError: There is none, or the file is not text.
    """
    texts = list(prompts)
    if file is not None:
        try:
            texts.append(file.read_text(encoding="utf-8"))
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


def _write(out: IO[str], text: str) -> None:
    """Write text at once; to a terminal without characters that it would obey."""
    if out.isatty():
        text = "".join(each if each.isprintable() or each in "\n\t" else "\N{REPLACEMENT CHARACTER}" for each in text)
    out.write(text)
    out.flush()
