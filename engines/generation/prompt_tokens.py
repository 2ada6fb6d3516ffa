"""Prompts as the tokens that are fed: texts, chats by the model's template, or tokens as they are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.errors import EngineError, one_line
from spike_export.artifacts.manifest import Manifest
from spike_export.artifacts.process.bounded_process import BoundedProcess, BudgetError
from spike_export.checkpoint.tokenizer import tokenizer_faults
from spike_export.engines.generation.bundle_tokenizer import BundleTokenizer

Chat = Sequence[Mapping[str, str]]
"""Messages with `role` and `content`, for the model's chat template."""

Tools = Sequence[Mapping[str, Any]]
"""Functions that a model may call, as JSON schemas."""

Prompt = str | Chat | Sequence[int] | NDArray[np.int64]
"""Text, a chat, or tokens [tokens] that are fed as they are, in a list or an array."""


@dataclass(frozen=True)
class PromptEncoder:
    """A bundle's tokenizer, and what its manifest says of BOS.

    BOS is put before a text that does not begin with it; a chat has what its template says. Where the prefix holds BOS,
    neither begins with it.
    """

    tokenizer: BundleTokenizer
    manifest: Manifest

    def started(self) -> Self:
        """Fork the process that renders and encodes now, before this one holds a runtime."""
        self._process.start()
        return self

    def close(self) -> None:
        """End that process; the next prompt starts another."""
        self._process.close()

    @cached_property
    def _process(self) -> BoundedProcess[tuple[str, tuple[Any, ...]], Any]:
        return BoundedProcess(lambda request: getattr(self, request[0])(*request[1]))

    def encode(self, prompts: Prompt | Sequence[Prompt], tools: Tools = ()) -> list[NDArray[np.int64]]:
        """Return each prompt's tokens [tokens], at least one.

        Args:
            prompts: One, or several.
            tools: Functions that the model may call, as its chat template takes them.

        Raises:
            EngineError: A prompt cannot be used; it is named by its place, counted from 0.
        """
        several: Any = prompts
        if isinstance(prompts, str) or (isinstance(prompts, np.ndarray) and prompts.ndim == 1) or _is_tokens(prompts):
            several = [prompts]
        if not isinstance(several, Sequence) and not (isinstance(several, np.ndarray) and several.ndim):
            raise EngineError(
                f"the prompts are of the type {type(prompts).__name__}; give one text, or a list of prompts"
            )
        if not len(several):
            raise EngineError("there is no prompt; give at least one")
        return [self._within_budget(row, "_encoded", prompt, row, tools) for row, prompt in enumerate(several)]

    def render(self, chat: Chat, tools: Tools = (), *, asks: bool = True) -> str:
        """Return a chat as the model's template writes it.

        Args:
            chat: The messages.
            tools: Functions that the model may call.
            asks: Whether the beginning of the model's answer stands at the end.

        Raises:
            EngineError: The chat cannot be used.
        """
        text: str = self._within_budget(0, "_rendered", chat, 0, tools, asks)
        return text

    def _within_budget(self, row: int, method: str, *arguments: Any) -> Any:
        try:
            return self._process.ask((method, arguments))
        except BudgetError as error:
            raise EngineError(
                f"prompt {row}: the bundle's chat template or tokenizer {error}; shorten the prompt, or export from a "
                "model whose tokenizer you trust"
            ) from error

    def _encoded(self, prompt: Any, row: int, tools: Tools) -> NDArray[np.int64]:
        if isinstance(prompt, Mapping):
            raise EngineError(
                f"prompt {row} is a single message; a chat is a list of them, and prompts a list of chats"
            )
        if isinstance(prompt, np.ndarray) or _is_tokens(prompt):
            tokens = _of_tokens(prompt, row)
        elif isinstance(prompt, str):
            tokens = self._of_text(prompt, row)
        else:
            tokens = self._of_chat(prompt, row, tools)
        if not len(tokens):
            raise EngineError(f"prompt {row} is empty; give some text")
        if tokens.min() < 0 or tokens.max() >= self.manifest.vocab_size:
            raise EngineError(
                f"prompt {row} holds the token {tokens.max() if tokens.min() >= 0 else tokens.min()}; the model knows "
                f"0 to {self.manifest.vocab_size - 1}"
            )
        return tokens

    def _of_text(self, text: str, row: int) -> NDArray[np.int64]:
        if not text:
            raise EngineError(f"prompt {row} is empty; give some text")
        tokens = self._tokenized(text, row)
        bos, prefix = self.manifest.bos_token_id, self.manifest.prefix
        if bos is not None and not (prefix is not None and prefix.holds_bos) and tokens[:1].tolist() != [bos]:
            return np.concatenate([[bos], tokens])
        return self._without_second_bos(tokens)

    def _without_second_bos(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Drop a BOS in front, of a text or template that spells it out, where the prefix holds it already."""
        bos, prefix = self.manifest.bos_token_id, self.manifest.prefix
        repeated = prefix is not None and prefix.holds_bos and tokens[:1].tolist() == [bos]
        return tokens[1:] if repeated else tokens

    def _of_chat(self, chat: Chat, row: int, tools: Tools) -> NDArray[np.int64]:
        text = self._rendered(chat, row, tools, asks=True)
        return self._without_second_bos(self._tokenized(text, row, add_special_tokens=False))

    def _rendered(self, chat: Chat, row: int, tools: Tools, asks: bool) -> str:
        if not isinstance(chat, Sequence) or not all(isinstance(message, Mapping) for message in chat):
            raise EngineError(f"prompt {row} is no text, no list of messages and no array of tokens; give one of these")
        if not chat:
            raise EngineError(f"prompt {row} is empty; give some messages")
        if not self.tokenizer.templates:
            raise EngineError(
                f"prompt {row} is a chat, and the bundle has no chat_template.jinja; give plain text, or export a chat "
                "model"
            )
        try:
            return self.tokenizer.render(chat, tools, asks=asks)
        except MemoryError:
            raise
        except Exception as error:  # templates raise jinja's errors, and whatever their expressions run into
            raise EngineError(f"prompt {row}: the chat template refuses it ({one_line(error)}); correct it") from error

    def _tokenized(self, text: str, row: int, *, add_special_tokens: bool = True) -> NDArray[np.int64]:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair: a byte of the command line that was no UTF-8
            raise EngineError(
                f"prompt {row} is no Unicode text: its character {error.start} cannot be encoded; give it in UTF-8"
            ) from error
        with tokenizer_faults(EngineError, f"prompt {row}: the tokenizer cannot encode it"):
            return np.array(self.tokenizer.encode(text, add_special_tokens=add_special_tokens), np.int64)


def _is_tokens(value: object) -> bool:
    """Return whether a value is a list of token numbers, as a tokenizer gives them."""
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or not len(value):
        return False
    return all(isinstance(token, (int, np.integer)) and not isinstance(token, bool) for token in value)


def _of_tokens(prompt: Any, row: int) -> NDArray[np.int64]:
    tokens = np.asarray(prompt)
    if tokens.ndim != 1:
        raise EngineError(f"prompt {row} has the shape {list(tokens.shape)}; expected tokens in one row")
    if tokens.size and tokens.dtype.kind not in "iu":
        raise EngineError(f"prompt {row} is of type {tokens.dtype}, and tokens are integers; correct it")
    return tokens.astype(np.int64)
