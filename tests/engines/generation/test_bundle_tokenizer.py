"""A bundle's tokenizer without transformers: the tokens and texts are those of transformers' `AutoTokenizer`."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from spike_export.artifacts.errors import EngineError
from spike_export.engines.generation.bundle_tokenizer import BundleTokenizer
from tests.support.tiny.checkpoints import EOS, write_tokenizer

CHAT: list[dict[str, object]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "a <b> & 'c' \N{SNOWMAN}", "name": None},
    {"role": "assistant", "content": "d", "reasoning": "because", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]},
    {"role": "user", "content": [{"type": "text", "text": "e"}]},
]
PREPARED: list[dict[str, object]] = [
    CHAT[0],
    {"role": "user", "content": "a <b> & 'c' \N{SNOWMAN}"},
    {"thinking": "because", **CHAT[2], "reasoning_content": "because"},
    CHAT[3],
]
"""The chat as newer versions of transformers give it to a template, and as older ones have to be given it."""

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"é": "<x>"}}}]

TEMPLATES = {
    "loops": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{% continue %}{{ 1 }}{% endfor %}x",
    "blocks are trimmed": "{% for m in messages %}\n    {% if m.role == 'user' %}\n  u\n    {% endif %}\n{% endfor %}",
    "json": "{{ tools | tojson }}{{ messages | tojson(indent=2) }}{{ messages[1] | tojson(sort_keys=True) }}",
    "special tokens": "{{ bos_token }}|{{ eos_token }}|{{ image_token }}|{{ pad_token is defined }}",
    "no tools": "{{ tools is none }} {{ documents is none }} {{ add_generation_prompt }}",
    "generation": "{% set x = 1 %}{% generation %}{{ x }}{% set x = 2 %}{% endgeneration %}{{ x }}",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content }},{{ m.thinking }},{{ m.reasoning }};{% endfor %}",
    "none is left out": "{{ messages[1].name is defined }}{{ messages[1] }}",
    "namespace": "{% set n = namespace(a=1, self=2) %}{% set n.a = n.a + 1 %}{{ n.a }}{{ n.self }}",
    "dict": "{{ dict(a=1, **{'b': 2}) }}{{ dict.fromkeys('ab', 0) }}",
    "time": "{{ strftime_now('%Y') | length }}",
}
REFUSED = {
    "the template's word": "{{ raise_exception('no ' ~ messages[0].role) }}",
    "python": "{{ messages.__class__ }}x{{ ''.__class__.__mro__ }}",
    "a private name": "{% set n = namespace() %}{% set n._x = 1 %}",
    "a private value": "{{ namespace(_x=1) }}",
    "a change of the chat": "{{ messages.append(1) }}",
    "no template": "{% for %}",
}

NEWLY_REFUSED = ("a private name", "a private value")
"""What older versions of transformers let a template do."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_token": "<s>"}))
    return tmp_path


def both(folder: Path) -> tuple[BundleTokenizer, Any]:
    return BundleTokenizer.read(folder), AutoTokenizer.from_pretrained(folder)


def test_templates_write_what_transformers_lets_them_write(folder: Path) -> None:
    """One chat with all that a message can hold, with tools and without."""
    (folder / "chat_template.jinja").write_text("x")
    _, theirs = both(folder)
    theirs.chat_template = "{{ messages[1].name is defined }}"
    prepares = theirs.apply_chat_template(CHAT, tokenize=False) == "False"
    chat = CHAT if prepares else PREPARED
    for name, template in TEMPLATES.items():
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        theirs.chat_template, ours = template, BundleTokenizer.read(folder)
        for tools in ([], TOOLS):
            wanted = theirs.apply_chat_template(chat, tools=tools or None, tokenize=False, add_generation_prompt=True)
            assert ours.render(CHAT, tools, asks=True) == wanted, name
    for name, template in REFUSED.items():
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        theirs.chat_template, ours = template, BundleTokenizer.read(folder)
        ways = [partial(ours.render, CHAT, [], asks=False)]
        if prepares or name not in NEWLY_REFUSED:
            ways.append(partial(theirs.apply_chat_template, CHAT, tokenize=False))
        faults = set()
        for render in ways:
            with pytest.raises(Exception) as fault:  # noqa: PT011  # whatever the template runs into
                render()
            faults.add(fault.type)
        assert len(faults) == 1, name


def test_of_several_templates_the_one_for_tools_is_taken_where_there_are_tools(folder: Path) -> None:
    _, theirs = both(folder)
    theirs.chat_template = {"default": "plain", "tool_use": "tools"}
    theirs.save_pretrained(folder)
    ours, theirs = both(folder)
    for tools, text in (([], "plain"), (TOOLS, "tools")):
        assert ours.render(CHAT, tools, asks=True) == text
        assert theirs.apply_chat_template(CHAT, tools=tools or None, tokenize=False) == text


@pytest.mark.parametrize("form", ["text", "several", "file"])
def test_a_template_in_the_configuration(folder: Path, form: str) -> None:
    """A file of its own goes before it."""
    path = folder / "tokenizer_config.json"
    given = [{"name": "default", "template": "of the list"}] if form == "several" else "of the text"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": given}))
    if form == "file":
        (folder / "chat_template.jinja").write_text("of the file")
    ours, theirs = both(folder)
    assert ours.render(CHAT, [], asks=True) == theirs.apply_chat_template(CHAT, tokenize=False)


def test_tokens_are_those_of_transformers(folder: Path) -> None:
    """Also of a file that says how to pad and to cut, which a prompt is not."""
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    document["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    document["padding"] = {
        "strategy": {"Fixed": 40}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<s>",
    }  # fmt: skip
    path.write_text(json.dumps(document))
    ours, theirs = both(folder)
    for text in ("", "abc defg", "<s>a</s> é\N{SNOWMAN}\n"):
        tokens = ours.encode(text)
        assert tokens == theirs.encode(text)
        assert ours.decode(tokens) == theirs.decode(tokens)
        assert ours.decode(tokens, skip_special_tokens=True) == theirs.decode(tokens, skip_special_tokens=True)
    assert (ours.eos_token_id, ours.special_tokens["bos_token"]) == (EOS, theirs.bos_token)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[]", "tokenizer_config.json is no JSON object"),
        ("{", "cannot load the tokenizer"),
        ('{"chat_template": 3}', "the chat template is of the type int, not a text"),
        ('{"chat_template": [{"name": "default"}]}', "cannot load the tokenizer"),
        (r'{"bos_token": "\ud800"}', "cannot load the tokenizer: .*surrogates not allowed"),
    ],
)
def test_a_damaged_configuration_is_one_line(folder: Path, config: str, message: str) -> None:
    (folder / "tokenizer_config.json").write_text(config)
    with pytest.raises(EngineError, match=message) as refused:
        BundleTokenizer.read(folder)
    assert str(refused.value).startswith(f"{folder}: cannot load the tokenizer: ")
    assert "\n" not in str(refused.value)
