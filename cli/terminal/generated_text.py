"""Text on the terminal as it is generated, or all of it as JSON."""

import io
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import IO, TYPE_CHECKING, Any

from spike_export.cli.terminal.output import print_json

if TYPE_CHECKING:
    from spike_export.engines.engine import Engine
    from spike_export.engines.generation.prompt_tokens import Prompt


def write_generated(
    engine: "Engine", prompts: Sequence["Prompt"], changes: dict[str, Any], *, as_json: bool, out: IO[str] | None = None
) -> None:
    """Write what follows each prompt: one prompt's text as it comes, several one after another, or JSON.

    Characters that the output's encoding lacks are replaced in text, and written as JSON's own escapes there.

    Args:
        engine: A runtime with its tokenizer.
        prompts: All are decoded together.
        changes: Options that differ from the bundle's own.
        as_json: Write a list of objects with text, tokens, finish reason and log-probabilities; with speculation also
            how many tokens were drafted and accepted.
        out: Where to; standard output when omitted.

    Raises:
        EngineError: A prompt or an option cannot be used, or the runtime fails.
    """
    out = out or sys.stdout
    if as_json:
        before = _drafted(engine)
        results = [asdict(result) for result in engine.generate(prompts, **changes)]
        if (drafted := _drafted(engine)) is not None and before is not None and len(results) == 1:
            results[0]["speculation"] = {name: drafted[name] - before[name] for name in drafted}
        print_json(results, out)
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


def _drafted(engine: "Engine") -> dict[str, int] | None:
    drafts = engine.drafts
    return None if drafts is None else {"drafted": drafts.drafted, "accepted": drafts.accepted}


def _write(out: IO[str], text: str) -> None:
    """Write text at once; to a terminal without characters that it would obey."""
    if out.isatty():
        text = "".join(each if each.isprintable() or each in "\n\t" else "\N{REPLACEMENT CHARACTER}" for each in text)
    out.write(text)
    out.flush()
