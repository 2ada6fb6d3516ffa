"""Calls of functions in a model's text: where they stand, and how each family of models writes them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from spike_export.engines.generation.stop_strings import unfinished
from spike_export.serving.grammars import AS_DUMPED
from spike_export.serving.openai.format_form import Source

ToolFormat = Literal["hermes", "llama3"]


@dataclass(frozen=True)
class Call:
    """A call of a function.

    Attributes:
        arguments: JSON text of an object.
    """

    name: str
    arguments: str


Split = tuple[str, list[Call]]
"""Plain text, and the calls behind it."""


@dataclass(frozen=True)
class Style:
    """How a family writes calls.

    Attributes:
        opening: Text in front of a call; empty where the whole text is one.
        closing: Text behind a call; empty where calls end with the text.
        arguments: Key of the arguments in a call's JSON.
        told_by: A part of this family's chat templates.
    """

    opening: str
    closing: str
    arguments: str
    told_by: str


STYLES: Mapping[ToolFormat, Style] = {
    "hermes": Style("<tool_call>", "</tool_call>", "arguments", "<tool_call>"),  # Hermes 2 Pro, Qwen 2.5 and 3
    "llama3": Style("", "", "parameters", '"parameters"'),  # Llama 3.1 and later
}


def tool_format(template: str) -> ToolFormat | None:
    """Return how a model writes calls, from its chat template; None where the template knows no tools."""
    if "tools" not in template:
        return None
    return next((name for name, style in STYLES.items() if style.told_by in template), None)


def required_call(name: ToolFormat, functions: Sequence[Mapping[str, Any]]) -> Source:
    """Return the grammar of a text that is one call of one of some functions, given as in a request's `tools`."""
    style = STYLES[name]
    schema = {"x-guidance": AS_DUMPED, "anyOf": [_call_schema(function, style) for function in functions]}
    if not style.opening:
        return "json_schema", schema
    opening, closing = json.dumps(f"{style.opening}\n"), json.dumps(f"\n{style.closing}")
    return "lark", f"start: {opening} call {closing}\ncall: %json {json.dumps(schema)}"


def _call_schema(function: Mapping[str, Any], style: Style) -> dict[str, Any]:
    arguments = function.get("parameters") or {"type": "object"}
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, style.arguments: arguments},
        "required": ["name", style.arguments],
        "additionalProperties": False,
    }


def parse_call(text: str, style: Style, known: Sequence[str]) -> Call | None:
    """Return the call that a text is; None where it is none, or calls a function that is not known."""
    try:
        value = json.loads(text.strip().removeprefix("<|python_tag|>"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or value.get("name") not in known:
        return None
    arguments = value.get(style.arguments, value.get("arguments", {}))
    if isinstance(arguments, str):  # some models write the JSON text
        return Call(value["name"], arguments)
    return Call(value["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None


class CallReader(Protocol):
    """Splits a text that arrives in pieces into plain text and calls; what looks like a call and is none stays text."""

    def feed(self, piece: str) -> Split:
        """Take the next piece; return the text and the calls that are certain by now."""

    def finish(self) -> Split:
        """Return what was held back, now that no more text follows."""


def call_reader(name: ToolFormat, known: Sequence[str]) -> CallReader:
    """Return a reader of a family's calls of known functions."""
    style = STYLES[name]
    return MarkedCalls(style, known) if style.opening else WholeCalls(style, known)


class MarkedCalls:
    """Calls that stand between two marks, anywhere in the text."""

    def __init__(self, style: Style, known: Sequence[str]) -> None:
        self._style, self._known, self._held = style, known, ""

    def feed(self, piece: str) -> Split:
        """See `CallReader`."""
        self._held += piece
        text, calls = "", list[Call]()
        while True:
            before, opening, after = self._held.partition(self._style.opening)
            if not opening:
                kept = unfinished(self._held, self._style.opening)
                text += self._held[: len(self._held) - kept]
                self._held = self._held[len(self._held) - kept :]
                return text, calls
            text += before
            inner, closing, rest = after.partition(self._style.closing)
            if not closing:
                self._held = opening + after
                return text, calls
            call = parse_call(inner, self._style, self._known)
            calls += [] if call is None else [call]
            text += opening + inner + closing if call is None else ""
            self._held = rest

    def finish(self) -> Split:
        """See `CallReader`. A call whose closing mark is missing counts: many models end there."""
        held, self._held = self._held, ""
        _, opening, inner = held.partition(self._style.opening)
        call = parse_call(inner, self._style, self._known) if opening else None
        return (held, []) if call is None else ("", [call])


class WholeCalls:
    """A text that is a call, or several with semicolons between; any other text begins differently."""

    def __init__(self, style: Style, known: Sequence[str]) -> None:
        self._style, self._known, self._held, self._plain = style, known, "", False

    def feed(self, piece: str) -> Split:
        """See `CallReader`."""
        self._held += piece
        begin = self._held.lstrip()
        if not self._plain and (not begin or begin[0] in "{<"):
            return "", []
        self._plain = True
        text, self._held = self._held, ""
        return text, []

    def finish(self) -> Split:
        """See `CallReader`."""
        held, self._held = self._held, ""
        whole = parse_call(held, self._style, self._known)
        found = [whole] if whole else [parse_call(part, self._style, self._known) for part in held.split(";")]
        calls = [call for call in found if call is not None]
        return ("", calls) if len(calls) == len(found) else (held, [])
