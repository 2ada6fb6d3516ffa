"""`/tokenize` and `/detokenize`, as vLLM's server has them."""

from typing import Annotated, Any

from pydantic import Field
from starlette.responses import Response

from spike_export.serving.openai.chat import Message
from spike_export.serving.openai.errors import RequestError
from spike_export.serving.openai.exchange import JsonAnswer
from spike_export.serving.openai.form import Form
from spike_export.serving.openai.requests import encoded, require_model
from spike_export.serving.service import Service


class TokenizeForm(Form):
    """A text, as completions read it, or messages, as chats do."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)] | None = None


class DetokenizeForm(Form):
    """Tokens."""

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=1 << 20)]


class Tokens:
    """The endpoints."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def tokenize(self, form: TokenizeForm) -> Response:
        """Return the tokens that a prompt is fed as; the prefix is not among them."""
        require_model(self._service, form.model)
        if (form.prompt is None) == (form.messages is None):
            raise RequestError("give either prompt or messages", param="prompt")
        prompt: Any = form.prompt if form.messages is None else [each.plain() for each in form.messages]
        (tokens,) = await encoded(self._service, [prompt], "prompt" if form.messages is None else "messages")
        found: list[int] = tokens.tolist()
        return JsonAnswer({"tokens": found, "count": len(found), "max_model_len": self._service.limits.context})

    async def detokenize(self, form: DetokenizeForm) -> Response:
        """Return the text of tokens, special ones included."""
        require_model(self._service, form.model)
        vocab = self._service.engine.manifest.vocab_size
        if any(token >= vocab for token in form.tokens):
            raise RequestError(f"there is a token {max(form.tokens)}; the model knows 0 to {vocab - 1}", param="tokens")
        text = self._service.engine.tokenizer.backend_tokenizer
        prompt = await self._service.off_loop(lambda: text.decode(form.tokens, skip_special_tokens=False))
        return JsonAnswer({"prompt": prompt})
