"""`/tokenize` and `/detokenize`, with the fields of vLLM's server and of llama.cpp's."""

from typing import Annotated, Any

from pydantic import ConfigDict, Field
from starlette.responses import Response

from spike_export.serving.openai.chat import Message
from spike_export.serving.openai.errors import RequestError
from spike_export.serving.openai.exchange import JsonAnswer
from spike_export.serving.openai.form import MOST_MESSAGES, MOST_TOKENS, Form, one_given
from spike_export.serving.openai.requests import encoded, plain_tokens, require_model
from spike_export.serving.service import Service


class TokenizeForm(Form):
    """A text, as completions read it, or messages, as chats do; or llama.cpp's `content`, a text by itself.

    Attributes:
        add_special: Whether `content` gets the token that begins a text.
        with_pieces: Whether each token of `content` is told with its text.
    """

    model_config = ConfigDict(json_schema_extra=one_given(prompt="string", messages="array", content="string"))

    model: str | None = None
    prompt: Annotated[str, Field(min_length=1)] | None = None
    messages: Annotated[list[Message], Field(min_length=1), MOST_MESSAGES] | None = None
    content: str | None = None
    add_special: bool = False
    with_pieces: bool = False


class DetokenizeForm(Form):
    """Tokens."""

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], MOST_TOKENS]


class Tokens:
    """The endpoints."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def tokenize(self, form: TokenizeForm) -> Response:
        """Return the tokens that a prompt is fed as; the prefix is not among them."""
        require_model(self._service, form.model)
        if sum(given is not None for given in (form.prompt, form.messages, form.content)) != 1:
            raise RequestError("give one of prompt, messages, content", param="prompt")
        if form.content is not None:
            return JsonAnswer({"tokens": await self._tokens_of(form.content, form)})
        prompt: Any = form.prompt if form.messages is None else [each.plain() for each in form.messages]
        (tokens,) = await encoded(self._service, [prompt], "prompt" if form.messages is None else "messages")
        found: list[int] = tokens.tolist()
        return JsonAnswer({"tokens": found, "count": len(found), "max_model_len": self._service.limits.context})

    async def detokenize(self, form: DetokenizeForm) -> Response:
        """Return the text of tokens, special ones included."""
        require_model(self._service, form.model)
        vocab = self._service.model.manifest.vocab_size
        if any(token >= vocab for token in form.tokens):
            raise RequestError(f"there is a token {max(form.tokens)}; the model knows 0 to {vocab - 1}", param="tokens")
        text = self._service.model.tokenizer.backend_tokenizer
        prompt = await self._service.off_loop(lambda: text.decode(form.tokens, skip_special_tokens=False))
        return JsonAnswer({"prompt": prompt, "content": prompt})

    async def _tokens_of(self, content: str, form: TokenizeForm) -> list[Any]:
        """Return the tokens of a text by itself: without what a prompt is fed with, unless it is asked for."""
        found = await plain_tokens(self._service, content) if content else []
        bos = self._service.model.manifest.bos_token_id
        if form.add_special and bos is not None and found[:1] != [bos]:
            found = [bos, *found]
        if not form.with_pieces:
            return list(found)
        text = self._service.model.tokenizer.backend_tokenizer
        return [{"id": token, "piece": text.decode([token], skip_special_tokens=False)} for token in found]
