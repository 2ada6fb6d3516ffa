"""JSON and server-sent events as bytes."""

import json
from typing import Any

DONE = b"data: [DONE]\n\n"
"""Ends a stream."""


def json_bytes(value: Any) -> bytes:
    """Return a value as JSON in UTF-8.

    Half of a surrogate pair, which JSON may hold and UTF-8 may not, stays the escape sequence that the client sent.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "backslashreplace")


def event_bytes(value: Any, name: str | None = None) -> bytes:
    """Return a value as a server-sent event."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + json_bytes(value) + b"\n\n"
