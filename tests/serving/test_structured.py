"""Texts of a form: whatever a random model says, the text is of the form that was asked for."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.tiny.service import Running, running

SAY: Any = [{"role": "user", "content": "Hello"}]

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["a", "b"]}},
    "required": ["kind"],
    "additionalProperties": False,
}

CALLING = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if tools %}{{ tools | length }} <tool_call>{% endif %}[assistant]"
)

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def calling(bundle: Path) -> Iterator[Running]:
    """The server of a model whose template knows tools,."""
    with running(bundle) as server:
        object.__setattr__(server.service.model.tokenizer, "templates", {"default": CALLING})
        yield server


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema(server: Running, stream: bool) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
    asked: Any = {"model": "tiny", "messages": SAY, "response_format": form, "max_completion_tokens": 120}
    client = server.client().chat.completions
    if stream:
        chunks = client.create(**asked, stream=True, temperature=1, seed=3)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    else:
        text = client.create(**asked, temperature=1, seed=3).choices[0].message.content or ""
    found = json.loads(text)
    assert found in ({"kind": "a"}, {"kind": "b"})


@pytest.mark.parametrize(
    ("outputs", "pattern"),
    [
        ({"regex": "[0-9]{3}-[a-f]{2}"}, "[0-9]{3}-[a-f]{2}"),
        ({"choice": ["yes", 'no "really"']}, 'yes|no "really"'),
        ({"grammar": 'start: "x" DIGIT "y"\nDIGIT: /[0-9]/'}, "x[0-9]y"),
        ({"json": {"type": "boolean"}}, "true|false"),
    ],
    ids=str,
)
def test_other_forms(server: Running, outputs: dict[str, Any], pattern: str) -> None:
    answer = server.client().completions.create(
        model="tiny", prompt="a", max_tokens=40, n=2, extra_body={"structured_outputs": outputs, "min_p": 0.01}
    )
    for choice in answer.choices:
        assert re.fullmatch(pattern, choice.text)
        assert choice.finish_reason == "stop"


@pytest.mark.parametrize(
    "changes",
    [
        {"response_format": {"type": "xml"}},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "strange"}}}},
        {"structured_outputs": {"regex": "a(b"}},
        {"structured_outputs": {"grammar": "start: nothing"}},
        {"structured_outputs": {}},
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        {"structured_outputs": {"regex": "a"}, "ignore_eos": True},
        {"tools": [WEATHER]},
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        {"tool_choice": "required"},
    ],
    ids=str,
)
def test_a_form_that_cannot_be_used(server: Running, changes: dict[str, Any]) -> None:
    answer = server.post("/v1/chat/completions", json={"messages": SAY, "max_tokens": 5, **changes})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_required_call(calling: Running, choice: Any, stream: bool) -> None:
    asked: Any = {"model": "tiny", "messages": SAY, "tools": [WEATHER], "tool_choice": choice, "max_tokens": 110}
    client = calling.client().chat.completions
    if stream:
        deltas = [chunk.choices[0] for chunk in client.create(**asked, stream=True)]
        (called,) = (call for each in deltas for call in each.delta.tool_calls or ())
        reason = deltas[-1].finish_reason
    else:
        (found,) = client.create(**asked).choices
        (called,) = found.message.tool_calls or ()
        assert found.message.content is None
        reason = found.finish_reason
    assert called.function is not None
    assert called.function.name == "weather"
    assert json.loads(called.function.arguments or "")["city"] in ("Rome", "Oslo")
    assert reason == "tool_calls"


def test_a_call_and_its_result_go_back_into_the_chat(calling: Running) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages: Any = [
        *SAY,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    ]
    answer = calling.client().chat.completions.create(model="tiny", messages=messages, tools=[WEATHER], max_tokens=3)
    assert answer.choices[0].finish_reason == "length"
    with pytest.raises(openai.BadRequestError, match="names no function"):
        calling.client().chat.completions.create(
            model="tiny", messages=SAY, tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "no"}}
        )
