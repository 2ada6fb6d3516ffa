"""Chats as text: a model's own template, run by Jinja in a sandbox.

Templates are written for transformers' `apply_chat_template`, and find here what that one offers: `tojson` without
HTML's escapes, `raise_exception`, `strftime_now`, `break` and `continue`, `{% generation %}`, and the special tokens by
name. Text of a template is somebody's else program: it sees plain data only, and no attribute with an underscore.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of a message's reasoning, the one that templates read first, and the one that gpt-oss's reads second."""


def rendered(
    template: str,
    chat: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    special_tokens: Mapping[str, str],
    *,
    asks: bool,
) -> str:
    """Return a chat as a template writes it.

    Args:
        template: Its text.
        chat: The messages; a field that is None is left out, because templates would write the word.
        tools: Functions that the model may call; the template is told of none where there is none.
        special_tokens: Name such as `bos_token` → text.
        asks: Whether the beginning of the model's answer stands at the end.

    Raises:
        Exception: Whatever the template's expressions run into; `jinja2.TemplateError` where it refuses the chat.
    """
    return _compiled(template).render(
        messages=[_with_reasoning(_plain(message)) for message in chat],
        tools=_plain(list(tools)) or None,
        documents=None,
        add_generation_prompt=asks,
        **special_tokens,
    )


@lru_cache(8)
def _compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment.from_string(template)


class _Generation(Extension):
    """`{% generation %}` around what the model writes: for training, and nothing here."""

    tags = {"generation"}  # noqa: RUF012  # Jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the block's content, with a scope of its own."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Namespace(Namespace):
    """Jinja's, which would otherwise take names that lead into Python."""

    def __init__(*args: Any, **values: Any) -> None:
        """Take values as `dict` does; `self` may be one of their names."""
        for name in dict(*args[1:], **values):
            _require_public(name)
        Namespace.__init__(*args, **values)

    def __setitem__(self, name: str, value: Any) -> None:
        """Set a value."""
        _require_public(name)
        super().__setitem__(name, value)


class _Dict:
    """Python's `dict` as templates call it, without the class's attributes."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """Return a mapping of keys to one value."""
        return dict.fromkeys(*args)


def _require_public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a template may not set {name!r}, which begins with an underscore")


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message without what is None, its reasoning under the names that templates read."""
    given = {name: value for name, value in message.items() if value is not None}
    reasoning = next((given[name] for name in _REASONING if name in given), None)
    if reasoning is None:
        return given
    return {_REASONING[1]: reasoning, **given, _REASONING[0]: reasoning}


def _plain(value: Any) -> Any:
    """Return a copy of a value of JSON's types alone: methods of other types are not for a template."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(name): _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    return f"<{type(value).__name__}>"
