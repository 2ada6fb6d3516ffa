"""Text from prompts: the Python interface over every runtime."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from spike_export.calibration.errors import EngineError, one_line
from spike_export.engines.decoding import DecodedStep, Decoding
from spike_export.engines.generation_options import GenerationOptions
from spike_export.engines.stop_strings import StopStrings
from spike_export.engines.token_stream import TokenStream
from spike_export.export.manifest import Manifest, load_manifest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from spike_export.engines.sequences import Provider

FinishReason = Literal["stop", "length"]
"""`stop`: a token that ends sequences, or a stop string; `length`: `max_new_tokens` are reached."""

Chat = Sequence[Mapping[str, str]]
"""Messages with `role` and `content`, for the model's chat template."""

Prompt = str | Chat | NDArray[np.int64]
"""Text, a chat, or tokens [tokens] that are fed as they are."""

_TOKENIZER_FILE, _GENERATION_FILE = "tokenizer.json", "generation_config.json"


@dataclass(frozen=True)
class TokenLogprob:
    """How probable a token was under the model itself, before temperature, penalty and filters.

    Attributes:
        logprob: Natural logarithm of its probability.
        top: The most probable tokens in its place, best first, each with its logarithm.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What one step adds to one prompt's text.

    Attributes:
        row: Which prompt, counted from 0.
        token_id: The token drawn.
        text: New text, whole characters only; empty while a character or a stop string may be unfinished.
        finish_reason: Why this was the row's last token; None where it goes on.
        logprob: None when not asked for.
    """

    row: int
    token_id: int
    text: str
    finish_reason: FinishReason | None = None
    logprob: TokenLogprob | None = None


@dataclass(frozen=True)
class Generation:
    """What followed one prompt.

    Attributes:
        text: Without special tokens; ends before a stop string.
        token_ids: All that were drawn, with the one that ended the sequence.
        prompt_tokens: How many tokens were fed, BOS included; the prefix is not counted.
        logprobs: One for each of `token_ids`; None when not asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True)
class Engine:
    """A runtime with the tokenizer and the manifest of the bundle it runs.

    Attributes:
        defaults: Options of the bundle's `generation_config.json`, with the tokens that end a sequence.
    """

    decoding: Decoding
    tokenizer: "PreTrainedTokenizerBase"
    manifest: Manifest
    defaults: GenerationOptions

    @classmethod
    def open(cls, path: Path | str, *, threads: int = 0, provider: "Provider" = "cpu") -> "Engine":
        """Open a bundle in ONNX Runtime.

        Args:
            path: Folder that export wrote.
            threads: For one operator; 0 for one per core.
            provider: Where to compute: `cpu`, or `cuda` with the extra `gpu`.

        Raises:
            ArtifactError: The manifest cannot be read.
            EngineError: The bundle is incomplete, has no tokenizer, or cannot be run here.
        """
        bundle = Path(path)
        manifest = load_manifest(bundle)
        tokenizer = _tokenizer(bundle)
        defaults = default_options(bundle, manifest, tokenizer)
        return cls(open_decoding(bundle, threads, provider), tokenizer, manifest, defaults)

    def generate(
        self, prompts: Prompt | Sequence[Prompt], options: GenerationOptions | None = None, **changes: Any
    ) -> list[Generation]:
        """Return what follows each prompt; all prompts are decoded together, and each as it would be alone.

        Args:
            prompts: One text, or a list of texts, chats and token arrays. BOS is put before a text that does not begin
                with it; a chat has what its template says. Where the prefix holds BOS, neither begins with it.
            options: Instead of the bundle's own defaults.
            changes: Fields of `GenerationOptions` that differ from those.

        Raises:
            EngineError: A prompt or an option cannot be used, or the runtime fails.
        """
        options = self._options(options, changes)
        tokens = self._tokens(prompts)
        pieces: list[list[Piece]] = [[] for _ in tokens]
        for piece in self._pieces(tokens, options):
            pieces[piece.row].append(piece)
        return [_joined(own, len(prompt)) for own, prompt in zip(pieces, tokens, strict=True)]

    def stream(
        self, prompts: Prompt | Sequence[Prompt], options: GenerationOptions | None = None, **changes: Any
    ) -> Iterator[Piece]:
        """Yield the text as it comes, a piece for each token; the arguments and errors are those of `generate`."""
        options = self._options(options, changes)
        return self._pieces(self._tokens(prompts), options)

    def _options(self, options: GenerationOptions | None, changes: Mapping[str, Any]) -> GenerationOptions:
        base = options or self.defaults
        options = replace(base, **changes)
        return options if options.eos_token_ids else replace(options, eos_token_ids=self.defaults.eos_token_ids)

    def _pieces(self, tokens: list[NDArray[np.int64]], options: GenerationOptions) -> Iterator[Piece]:
        steps = self.decoding.decode(tokens, options)  # what does not fit is said here, not at the first piece
        return _streamed(steps, [_Row(self.tokenizer, row, prompt, options) for row, prompt in enumerate(tokens)])

    def _tokens(self, prompts: Prompt | Sequence[Prompt]) -> list[NDArray[np.int64]]:
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


def open_decoding(path: Path, threads: int, provider: "Provider") -> Decoding:
    """Open the runtime of what lies at a path.

    Raises:
        ArtifactError: The manifest cannot be read.
        EngineError: It cannot be run here.
    """
    from spike_export.engines.onnx_decoding import OnnxDecoding
    from spike_export.engines.onnx_session import open_for_generation

    return OnnxDecoding(open_for_generation(path, threads, provider))


def default_options(bundle: Path, manifest: Manifest, tokenizer: Any) -> GenerationOptions:
    """Return the options that the model's makers give in `generation_config.json`.

    The tokens that end a sequence are that file's, else the manifest's, else the tokenizer's.

    Raises:
        EngineError: The file is damaged, or has an impossible value.
    """
    path = bundle / _GENERATION_FILE
    try:
        given = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        eos = given.get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise EngineError(f"{path}: not a JSON object ({one_line(error)}); export the bundle again") from error
    known = {field.name for field in fields(GenerationOptions)} - {"eos_token_ids", "stop_strings", "logprobs"}
    values = {name: value for name, value in given.items() if name in known and value is not None}
    ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
    ends = ends or list(manifest.eos_token_ids) or [getattr(tokenizer, "eos_token_id", None)]
    try:
        return GenerationOptions(**values, eos_token_ids=tuple(end for end in ends if end is not None))
    except (EngineError, TypeError) as error:
        raise EngineError(f"{path}: {one_line(error)}; correct it") from error


class _Row:
    """One prompt's text in progress."""

    def __init__(self, tokenizer: Any, row: int, prompt: NDArray[np.int64], options: GenerationOptions) -> None:
        self._row, self._options = row, options
        self._stream = TokenStream(tokenizer.backend_tokenizer, prompt.tolist())
        self._stops = StopStrings(options.stop_strings)
        self._count = 0
        self.ended = False

    def take(self, step: DecodedStep) -> Piece:
        """Return the piece of a step."""
        options, token = self._options, int(step.tokens[self._row])
        self._count += 1
        reason: FinishReason | None = None
        ends = token in options.eos_token_ids and not options.ignore_eos
        text = "" if ends else self._stops.feed(self._stream.feed(token))
        if self._stops.found:
            reason = "stop"
        elif ends or self._count == options.max_new_tokens:
            text += self._stops.feed(self._stream.finish())
            reason = "stop" if ends or self._stops.found else "length"
            text += self._stops.finish()
        self.ended = reason is not None
        return Piece(self._row, token, text, reason, self._logprob(step, token))

    def _logprob(self, step: DecodedStep, token: int) -> TokenLogprob | None:
        if step.logprobs is None:
            return None
        top: tuple[tuple[int, float], ...] = ()
        if step.top_tokens is not None and step.top_logprobs is not None:
            pairs = zip(step.top_tokens[self._row].tolist(), step.top_logprobs[self._row].tolist(), strict=True)
            top = tuple(pairs)
        return TokenLogprob(token, float(step.logprobs[self._row]), top)


def _streamed(steps: Iterator[DecodedStep], rows: Sequence[_Row]) -> Iterator[Piece]:
    for step in steps:
        for row in rows:
            if not row.ended:
                yield row.take(step)
        if all(row.ended for row in rows):
            return


def _joined(pieces: Sequence[Piece], prompt_tokens: int) -> Generation:
    reason = pieces[-1].finish_reason
    assert reason is not None, "a row's last piece says why it ended"
    logprobs = tuple(piece.logprob for piece in pieces if piece.logprob is not None)
    return Generation(
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(piece.token_id for piece in pieces),
        finish_reason=reason,
        prompt_tokens=prompt_tokens,
        logprobs=logprobs or None,
    )


def _tokenizer(bundle: Path) -> "PreTrainedTokenizerBase":
    if not (bundle / _TOKENIZER_FILE).is_file():
        raise EngineError(
            f"{bundle / _TOKENIZER_FILE}: this file is missing, and text needs a tokenizer; export from a model that "
            "has one"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            bundle, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever a damaged file makes the tokenizer raise
        raise EngineError(f"{bundle}: cannot load the tokenizer: {one_line(error)}") from error
    return tokenizer
