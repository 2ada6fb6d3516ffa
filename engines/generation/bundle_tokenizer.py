"""A bundle's tokenizer by the package tokenizers alone: text to tokens, tokens to text, chats to text.

It is what transformers' `AutoTokenizer` would load from the bundle, without the seconds that importing transformers
takes. `tokenizer.json` holds all that turns text into tokens, because export wrote it from the tokenizer in use.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from tokenizers import Tokenizer

from spike_export.artifacts.errors import EngineError
from spike_export.checkpoint.tokenizer import loading_tokenizer

_TOKENIZER, _CONFIG, _TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
_FURTHER_TEMPLATES = "additional_chat_templates"
_DEFAULT, _FOR_TOOLS = "default", "tool_use"
"""Names of templates where a model has several."""


@dataclass(frozen=True)
class BundleTokenizer:
    """A tokenizer with its special tokens and chat templates.

    Attributes:
        backend_tokenizer: Turns text into tokens and back.
        special_tokens: Name such as `bos_token` → text.
        templates: Name → chat template; `default` is a model's only one.
    """

    backend_tokenizer: Tokenizer
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    templates: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, bundle: Path) -> Self:
        """Read the tokenizer's files in a bundle.

        Raises:
            EngineError: There is none, or it is damaged.
        """
        require_tokenizer(bundle)
        with loading_tokenizer(EngineError, bundle):
            backend = Tokenizer.from_file(str(bundle / _TOKENIZER))
            backend.no_truncation()
            backend.no_padding()
            config = _config(bundle / _CONFIG)
            backend.encode_special_tokens = config.get("split_special_tokens") is True
            tokenizer = cls(backend, dict(_special_tokens(config)), dict(_templates(bundle, config)))
            tokenizer.decode(tokenizer.encode("a"))
            return tokenizer

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text; None where none is named."""
        text = self.special_tokens.get("eos_token")
        return None if text is None else self.backend_tokenizer.token_to_id(text)

    @property
    def chat_template(self) -> str | None:
        """The text of all templates; None where there is none."""
        return "\n".join(self.templates.values()) or None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the tokens of a text, with those that the tokenizer puts around it where that is asked for."""
        tokens: list[int] = self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return tokens

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of tokens."""
        text: str = self.backend_tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)
        return text

    def render(self, chat: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], *, asks: bool) -> str:
        """Return a chat as the model's template writes it; see `chat_template.rendered`.

        Raises:
            Exception: The template refuses the chat, or there is none.
        """
        from spike_export.engines.generation.chat_template import rendered  # most programs render nothing

        name = _FOR_TOOLS if tools and _FOR_TOOLS in self.templates else _DEFAULT
        if name not in self.templates:
            raise ValueError(f"there is no template of the name {name}, only {', '.join(self.templates)}")
        return rendered(self.templates[name], chat, tools, self.special_tokens, asks=asks)


def require_tokenizer(bundle: Path) -> None:
    """Refuse a bundle without a tokenizer.

    Raises:
        EngineError: There is none.
    """
    if not (bundle / _TOKENIZER).is_file():
        raise EngineError(
            f"{bundle / _TOKENIZER}: this file is missing, and text needs a tokenizer; export from a model that has one"
        )


def _config(path: Path) -> dict[str, Any]:
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if not isinstance(config, dict):
        raise TypeError(f"{path.name} is no JSON object")
    return config


def _special_tokens(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the named tokens of a configuration: `…_token`, as text or as an object with its content."""
    groups = [config.get(name) for name in ("model_specific_special_tokens", "extra_special_tokens")]
    for group in (config, *(each for each in groups if isinstance(each, dict))):
        for name, value in group.items():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str):
                yield name, _encodable(text)


def _templates(bundle: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the chat templates: in files of their own, else in the configuration, as one or as several by name."""
    files = {path.stem: path for path in sorted((bundle / _FURTHER_TEMPLATES).glob("*.jinja"))}
    if (bundle / _TEMPLATE).is_file():
        files[_DEFAULT] = bundle / _TEMPLATE
    given = config.get("chat_template")
    if files or given is None:
        yield from ((name, path.read_text(encoding="utf-8")) for name, path in files.items())
    elif isinstance(given, list):
        yield from ((str(each["name"]), _encodable(each["template"])) for each in given)
    else:
        yield _DEFAULT, _encodable(given)


def _encodable(text: Any) -> str:
    """Return a text of a configuration, which may hold halves of characters, or something that is no text.

    Raises:
        TypeError: It is no text.
        UnicodeEncodeError: It is none that can be written.
    """
    if not isinstance(text, str):
        raise TypeError(f"the chat template is of the type {type(text).__name__}, not a text")
    text.encode()
    return text
