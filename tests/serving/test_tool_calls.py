"""Calls in a model's text, in whatever pieces the text arrives."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spike_export.serving.openai.tool_calls import Call, ToolFormat, call_reader, tool_format

KNOWN = ("weather", "time")

TEXTS: list[tuple[ToolFormat, str, str, list[Call]]] = [
    (
        "hermes",
        'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>',
        "Let me see.\n",
        [Call("weather", '{"city": "Köln"}')],
    ),
    (
        "hermes",
        '<tool_call>{"name": "time", "arguments": {}}</tool_call>\n<tool_call>{"name": "weather", "arguments": "{}"}',
        "\n",
        [Call("time", "{}"), Call("weather", "{}")],
    ),
    ("hermes", "2 < 3 <tool", "2 < 3 <tool", []),
    ("hermes", "<tool_call>{broken</tool_call> on", "<tool_call>{broken</tool_call> on", []),
    ("hermes", '<tool_call>{"name": "rm"}</tool_call>', '<tool_call>{"name": "rm"}</tool_call>', []),
    ("llama3", '{"name": "weather", "parameters": {"city": "Rome"}}', "", [Call("weather", '{"city": "Rome"}')]),
    (
        "llama3",
        '<|python_tag|>{"name": "time", "parameters": {}}; {"name": "time", "parameters": {"z": 2}}',
        "",
        [Call("time", "{}"), Call("time", '{"z": 2}')],
    ),
    ("llama3", 'It is {"name": "time", "parameters": {}}', 'It is {"name": "time", "parameters": {}}', []),
    ("llama3", '{"name": "other", "parameters": {}}', '{"name": "other", "parameters": {}}', []),
    ("llama3", "{" * 5000, "{" * 5000, []),
]


@pytest.mark.parametrize(("name", "text", "plain", "calls"), TEXTS)
@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(0, 120), max_size=8))
def test_calls_do_not_depend_on_the_pieces(
    name: ToolFormat, text: str, plain: str, calls: list[Call], cuts: list[int]
) -> None:
    reader, found = call_reader(name, KNOWN), []
    told, ends = "", sorted({*cuts, len(text)})
    for start, end in zip([0, *ends], ends, strict=False):
        more, called = reader.feed(text[start:end])
        told, found = told + more, found + called
    more, called = reader.finish()
    assert (told + more, found + called) == (plain, calls)


QWEN = "{%- if tools %}...<tool_call></tool_call>{% endif %}"
LLAMA = """{%- if tools is not none %}Environment: ipython{{ 'as {"name": n, "parameters": {}}' }}{% endif %}"""


@pytest.mark.parametrize(
    ("template", "expected"), [(QWEN, "hermes"), (LLAMA, "llama3"), ("{{ messages }}", None), ("{{ tools }}", None)]
)
def test_the_template_tells_how_calls_are_written(template: str, expected: Any) -> None:
    assert tool_format(template) == expected
