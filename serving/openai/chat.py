"""`/v1/chat/completions`: the next message of a chat."""

from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from spike_export.engines.generation.generated_text import Generation, Piece
from spike_export.serving.openai.errors import RequestError
from spike_export.serving.openai.exchange import (
    EventStream,
    Identity,
    JsonAnswer,
    guarded,
    observed,
    results,
    submitted,
    usage,
)
from spike_export.serving.openai.json_text import DONE, event_bytes
from spike_export.serving.openai.logprobs import chat_logprob
from spike_export.serving.openai.requests import encoded, new_tokens, require_model, works_of
from spike_export.serving.openai.sampling_form import SamplingForm
from spike_export.serving.scheduling.answer import Answer
from spike_export.serving.scheduling.batch import Work
from spike_export.serving.service import Service


class TextPart(BaseModel):
    """A part of a message; parts other than text are refused."""

    type: str
    text: str = ""


class Message(BaseModel):
    """A message; what else it has is the chat template's matter."""

    model_config = ConfigDict(extra="allow")

    role: Annotated[str, Field(min_length=1, max_length=100)]
    content: str | list[TextPart] | None = None

    def plain(self) -> dict[str, Any]:
        """Return the message with its content as one text.

        Raises:
            RequestError: A part is no text.
        """
        fields = self.model_dump(exclude_none=True)
        if isinstance(self.content, list):
            for part in self.content:
                if part.type not in ("text", "input_text", "output_text"):
                    raise RequestError(f"a message has content of type {part.type!r}; expected text", param="messages")
            fields["content"] = "".join(part.text for part in self.content)
        return {"content": ""} | fields


class ChatForm(SamplingForm):
    """The body of a request."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def size(self) -> tuple[int | None, str]:
        """Most new tokens, and the field that says so; `max_tokens` is the older name."""
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens, "max_completion_tokens"
        return self.max_tokens, "max_tokens"


class ChatCompletions:
    """The endpoint."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, form: ChatForm, request: Request) -> Response:
        """Answer a chat, in one piece or as a stream."""
        require_model(self._service, form.model)
        if form.top_logprobs is not None and not form.logprobs:
            raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
        prompts = await encoded(self._service, [[message.plain() for message in form.messages]], "messages")
        asked, param = form.size
        size = new_tokens(self._service, len(prompts[0]), asked, None, param)
        logprobs = (form.top_logprobs or 0) if form.logprobs else None
        works = works_of(self._service, form, prompts, [size], logprobs)
        identity = Identity("chat.completion", self._service.settings.model, "chatcmpl")
        if form.stream:
            answer = submitted(self._service, works)
            return EventStream(guarded(self._service, answer, self._events(form, identity, answer, works)))
        found, reused = await results(self._service, request, works)
        choices = [self._choice(number, each) for number, each in enumerate(found)]
        counts = usage(works, sum(len(each.token_ids) for each in found), reused, form.choices)
        return JsonAnswer(identity.head() | {"choices": choices, "usage": counts})

    def _choice(self, number: int, found: Generation) -> dict[str, Any]:
        message = {"role": "assistant", "content": found.text, "refusal": None}
        return {
            "index": number,
            "message": message,
            "logprobs": self._logprobs(found.logprobs),
            "finish_reason": found.finish_reason,
        }

    async def _events(
        self, form: ChatForm, identity: Identity, answer: Answer, works: Sequence[Work]
    ) -> AsyncIterator[bytes]:
        head, generated = identity.head("chat.completion.chunk"), 0
        for number in range(len(works)):
            yield event_bytes(head | {"choices": [_delta(number, {"role": "assistant", "content": ""})]})
        async for number, piece in observed(self._service, answer, works):
            generated += 1
            if piece.text or piece.finish_reason or piece.logprob:
                yield event_bytes(head | {"choices": [self._piece(number, piece)]})
        if form.usage_in_stream:
            yield event_bytes(head | {"choices": [], "usage": usage(works, generated, answer.reused, form.choices)})
        yield DONE

    def _piece(self, number: int, piece: Piece) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text or piece.finish_reason is None else {}
        logprobs = self._logprobs(None if piece.logprob is None else (piece.logprob,))
        return _delta(number, delta, piece.finish_reason, logprobs)

    def _logprobs(self, found: Sequence[Any] | None) -> dict[str, Any] | None:
        if not found:
            return None
        text = self._service.engine.tokenizer.backend_tokenizer
        return {"content": [chat_logprob(each, text) for each in found], "refusal": None}


def _delta(
    number: int, delta: dict[str, str], reason: str | None = None, logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
