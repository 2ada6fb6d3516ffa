"""A bundle, or the unquantized model, as a model of lm-evaluation-harness.

Importing this module needs the extra `lm-eval`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM

from spike_export.artifacts.errors import EngineError
from spike_export.artifacts.manifest import Manifest
from spike_export.engines.tasks.continuation_scores import Model, score_continuations
from spike_export.engines.tasks.token_rows import Request, Tokens
from spike_export.engines.tasks.written_texts import TextRequest, Write

Encode = Callable[[str], list[int]]
"""Text → its tokens, without those that a tokenizer puts around a text."""

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names that tasks give to the most tokens of a text, in the order in which the harness looks at them."""

_LENGTH = 256
"""Where a task gives none; the harness's own default."""


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """Answers the harness's questions for likelihoods, and writes the texts that it asks for.

    The model is fed BOS once, by its prefix or before the text. A text without context is scored behind BOS, also
    where the prefix holds BOS: its first token can only be scored behind some token.

    Attributes:
        computing: Whether the model is at work, or failed at it; what fails otherwise is the task's.
    """

    def __init__(self, model: Model, write: Write, encode: Encode, manifest: Manifest) -> None:
        """Wrap a model.

        Args:
            model: Gives logits.
            write: Writes texts.
            encode: Of the bundle's tokenizer.
            manifest: Of the bundle; the unquantized model behind its prefix takes the same tokens.
        """
        super().__init__()
        self._model, self._write, self._encode, self._manifest = model, write, encode, manifest
        self.computing = False

    @property
    def eot_token_id(self) -> int:
        """BOS, or where there is none the token that ends a text."""
        manifest = self._manifest
        ends = manifest.eos_token_ids
        if manifest.bos_token_id is None and not ends:
            raise EngineError("the bundle names neither BOS nor a token that ends a text, and a task has no context")
        return ends[0] if manifest.bos_token_id is None else manifest.bos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the tokens of a text; BOS is put before them later."""
        return self._encode(string)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return log-likelihood and greediness of each request's continuation, without a progress bar."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        self.computing = True
        asked = [self._request(*each) for each in requests]
        scores = score_continuations(self._model, asked, self._manifest.vocab_size)
        self.computing = False
        return [(score.log_probability, score.greedy) for score in scores]

    def _request(self, texts: tuple[str, str], context: list[int], continuation: list[int]) -> Request:
        if not continuation:
            raise EngineError(f"a task has an answer without tokens behind {texts[0][-60:]!r}; correct its data")
        request = Request(_with_bos(tuple(context), self._manifest), tuple(continuation))
        self._require_room(texts[0], len(request.fed))
        return request

    def _require_room(self, text: str, tokens: int) -> None:
        room = self._manifest.capacity or self._manifest.max_position_embeddings
        if tokens > room:
            raise EngineError(
                f"a task has a text of {tokens} tokens, and a sequence has room for {room}: it begins with "
                f"{text[:60]!r}; take fewer examples (num_fewshot), or leave the task out"
            )

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """Refuse: tasks of whole texts have no answers, and are never loaded."""
        raise NotImplementedError

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Return the text that the model writes behind each context."""
        asked = [self._text_request(*each.args) for each in requests]
        self.computing = True
        texts = self._write(asked)
        self.computing = False
        return texts

    def _text_request(self, context: str, wanted: Mapping[str, Any]) -> TextRequest:
        tokens = tuple(self._encode(context)) or (self.eot_token_id,)
        until, length = wanted.get("until") or (), next((wanted[name] for name in LENGTHS if name in wanted), _LENGTH)
        stops = (until,) if isinstance(until, str) else tuple(until)
        request = TextRequest(_with_bos(tokens, self._manifest), tuple(filter(None, stops)), int(length))
        self._require_room(context, len(request.context) + request.tokens - 1)
        return request


def _with_bos(context: Tokens, manifest: Manifest) -> Tokens:
    """Return a context, not empty, with the BOS that the caller of the bundle has to feed."""
    bos = manifest.bos_token_id
    if bos is None:
        return context
    spelled = context[0] == bos
    if manifest.prefix is not None and manifest.prefix.holds_bos:
        return context[1:] if spelled and len(context) > 1 else context
    return context if spelled else (bos, *context)
