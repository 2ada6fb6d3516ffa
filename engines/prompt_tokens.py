"""Prompts as the tokens that are fed: texts, chats by the model's template, or tokens as they are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spike_export.calibration.errors import EngineError, one_line
from spike_export.export.manifest import Manifest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Chat = Sequence[Mapping[str, str]]
"""Messages with `role` and `content`, for the model's chat template."""

Prompt = str | Chat | NDArray[np.int64]
"""Text, a chat, or tokens [tokens] that are fed as they are."""


@dataclass(frozen=True)
class PromptEncoder:
    """A bundle's tokenizer, and what its manifest says of BOS.

    BOS is put before a text that does not begin with it; a chat has what its template says. Where the prefix holds BOS,
    neither begins with it.
    """

    tokenizer: "PreTrainedTokenizerBase"
    manifest: Manifest

    def encode(self, prompts: Prompt | Sequence[Prompt]) -> list[NDArray[np.int64]]:
        """Return each prompt's tokens [tokens], at least one.

        Args:
            prompts: One, or several.

        Raises:
            EngineError: A prompt cannot be used; it is named by its place, counted from 0.
        """
        if isinstance(prompts, str) or (isinstance(prompts, np.ndarray) and prompts.ndim == 1):
            prompts = [prompts]
        if not len(prompts):
            raise EngineError("there is no prompt; give at least one")
        return [self._encoded(prompt, row) for row, prompt in enumerate(prompts)]

    def _encoded(self, prompt: Any, row: int) -> NDArray[np.int64]:
        if isinstance(prompt, Mapping):
            raise EngineError(
                f"prompt {row} is a single message; a chat is a list of them, and prompts a list of chats"
            )
        if isinstance(prompt, np.ndarray):
            tokens = prompt.astype(np.int64)
        elif isinstance(prompt, str):
            tokens = self._of_text(prompt, row)
        else:
            tokens = self._of_chat(prompt, row)
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
        tokens = np.array(self.tokenizer.encode(text), np.int64)
        bos, prefix = self.manifest.bos_token_id, self.manifest.prefix
        if bos is not None and not (prefix is not None and prefix.holds_bos) and tokens[:1].tolist() != [bos]:
            return np.concatenate([[bos], tokens])
        return self._without_second_bos(tokens)

    def _without_second_bos(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Drop a BOS in front, of a text or template that spells it out, where the prefix holds it already."""
        bos, prefix = self.manifest.bos_token_id, self.manifest.prefix
        repeated = prefix is not None and prefix.holds_bos and tokens[:1].tolist() == [bos]
        return tokens[1:] if repeated else tokens

    def _of_chat(self, chat: Chat, row: int) -> NDArray[np.int64]:
        if not chat:
            raise EngineError(f"prompt {row} is empty; give some messages")
        if not all(isinstance(message, Mapping) for message in chat):
            raise EngineError(f"prompt {row} is no text, no list of messages and no array of tokens; give one of these")
        if not self.tokenizer.chat_template:
            raise EngineError(
                f"prompt {row} is a chat, and the bundle has no chat_template.jinja; give plain text, or export a chat "
                "model"
            )
        try:
            text = self.tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise jinja's errors, and whatever their expressions run into
            raise EngineError(f"prompt {row}: the chat template refuses it ({one_line(error)}); correct it") from error
        return self._without_second_bos(np.array(self.tokenizer.encode(text, add_special_tokens=False), np.int64))
