"""`/v1/responses`: the next message of a chat, in the shape of OpenAI's newer interface. Nothing is stored.

A form of its own, because its fields have names of their own; what it asks for is a chat.
"""

from collections.abc import AsyncIterator, Sequence
from itertools import count
from typing import Annotated, Any, Literal, Self

from fastapi import Request
from pydantic import ConfigDict, Field, model_validator
from starlette.responses import Response

from spike_export.engines.generation.generated_text import FinishReason, Generation
from spike_export.serving.openai.chat import Message
from spike_export.serving.openai.errors import RequestError
from spike_export.serving.openai.exchange import Identity, answered, followed, timings, told_progress
from spike_export.serving.openai.form import MOST_MESSAGES, Form, needed_if
from spike_export.serving.openai.format_form import Source
from spike_export.serving.openai.json_text import event_bytes
from spike_export.serving.openai.requests import encoded, new_tokens, require_model, works_of
from spike_export.serving.openai.sampling_form import SamplingForm
from spike_export.serving.scheduling.answer import Answer, Progress
from spike_export.serving.scheduling.batch import Work
from spike_export.serving.service import Service


class InputMessage(Message):
    """A message of `input`."""

    type: Literal["message"] = "message"


class TextFormat(Form):
    """A form of the text; its schema has no envelope of its own here."""

    model_config = ConfigDict(
        json_schema_extra=needed_if({"type": {"const": "json_schema"}}, {"schema": {"type": "object"}})
        | {"else": {"properties": {"schema": {"type": "null"}}}}
    )

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None

    @model_validator(mode="after")
    def _require_schema(self) -> Self:
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise ValueError("type json_schema, and no other, has a schema")
        return self


class TextForm(Form):
    """OpenAI's `text`: what the text has to be like."""

    format: TextFormat = TextFormat()

    @property
    def source(self) -> Source | None:
        """The grammar; None for any text."""
        if self.format.type == "text":
            return None
        return ("json_object", None) if self.format.schema_ is None else ("json_schema", self.format.schema_)


class ResponseForm(SamplingForm):
    """The body of a request."""

    input: str | Annotated[list[InputMessage], Field(min_length=1), MOST_MESSAGES]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    previous_response_id: None = None
    conversation: None = None
    background: Annotated[bool, Field(json_schema_extra={"const": False})] | None = None
    n: Literal[1] | None = None
    text: TextForm = TextForm()
    tools: Annotated[list[Any], Field(max_length=0)] | None = None

    @property
    def chat(self) -> list[dict[str, Any]]:
        """The messages of the chat."""
        before = [{"role": "system", "content": self.instructions}] if self.instructions else []
        if isinstance(self.input, str):
            return [*before, {"role": "user", "content": self.input}]
        return [*before, *({"role": _role(each.role), "content": each.plain()["content"]} for each in self.input)]


def _role(role: str) -> str:
    return "system" if role == "developer" else role


class Responses:
    """The endpoint."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, form: ResponseForm, request: Request) -> Response:
        """Answer, in one piece or as a stream of named events."""
        require_model(self._service, form.model)
        if form.background:
            raise RequestError("nothing is kept here for later; leave background out", param="background")
        prompts = await encoded(self._service, [form.chat], "input")
        size = new_tokens(self._service, len(prompts[0]), form.max_output_tokens, None, "max_output_tokens")
        works = await works_of(self._service, form, prompts, [size], None, form.text.source)
        told = _Told(form, Identity("response", self._service, "resp"), works[0])

        def whole(found: Sequence[Generation], answer: Answer) -> dict[str, Any]:
            (only,) = found
            return told.whole(only.text, len(only.token_ids), only.finish_reason, answer.reused[0])

        def events(answer: Answer) -> AsyncIterator[bytes]:
            return self._events(told, answer, works)

        return await answered(self._service, request, works, whole, events if form.stream else None)

    async def _events(self, told: "_Told", answer: Answer, works: list[Work]) -> AsyncIterator[bytes]:
        numbers = count()

        def event(kind: str, **fields: Any) -> bytes:
            return event_bytes({"type": kind, "sequence_number": next(numbers), **fields}, kind)

        place = {"item_id": told.item_id, "output_index": 0}
        yield event("response.created", response=told.begun())
        yield event("response.in_progress", response=told.begun())
        yield event("response.output_item.added", output_index=0, item=told.item(None))
        yield event("response.content_part.added", **place, content_index=0, part=_part(""))
        text, generated, reason = "", 0, None
        async for _, piece in followed(self._service, answer, works):
            if isinstance(piece, Progress):
                if told.form.return_progress:
                    yield event("response.in_progress", response=told.begun(), **told_progress(piece))
                continue
            text, generated, reason = text + piece.text, generated + 1, piece.finish_reason
            if piece.text:
                delta = {"content_index": 0, "delta": piece.text, "logprobs": []}
                yield event("response.output_text.delta", **place, **delta, **told.timings(generated, answer))
        yield event("response.output_text.done", **place, content_index=0, text=text, logprobs=[])
        yield event("response.content_part.done", **place, content_index=0, part=_part(text))
        yield event("response.output_item.done", output_index=0, item=told.item(text))
        whole = told.whole(text, generated, reason, answer.reused[0])
        yield event(f"response.{whole['status']}", response=whole, **told.timings(generated, answer))


class _Told:
    """A response as it is told: when it begins, and when it has ended."""

    def __init__(self, form: ResponseForm, identity: Identity, work: Work) -> None:
        self.form, self._identity, self._work = form, identity, work
        self.item_id = f"msg_{identity.id}"

    def begun(self) -> dict[str, Any]:
        """Return the response without output."""
        return self._fields("in_progress") | {"output": [], "usage": None}

    def item(self, text: str | None) -> dict[str, Any]:
        """Return the message, with its text when it is complete."""
        status, content = ("in_progress", []) if text is None else ("completed", [_part(text)])
        return {"type": "message", "id": self.item_id, "status": status, "role": "assistant", "content": content}

    def whole(self, text: str, generated: int, reason: FinishReason | None, reused: int) -> dict[str, Any]:
        """Return the response with its output; it is incomplete where the tokens ran out."""
        short = reason == "length"
        usage = {
            "input_tokens": len(self._work.prompt),
            "input_tokens_details": {"cached_tokens": reused},
            "output_tokens": generated,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": len(self._work.prompt) + generated,
        }
        details = {"reason": "max_output_tokens"} if short else None
        fields = self._fields("incomplete" if short else "completed")
        return fields | {"output": [self.item(text)], "usage": usage, "incomplete_details": details}

    def timings(self, generated: int, answer: Answer) -> dict[str, Any]:
        """Return llama.cpp's `timings` where the request asks for them."""
        if not self.form.timings_per_token:
            return {}
        return {"timings": timings(len(self._work.prompt), answer.reused[0], generated, answer)}

    def _fields(self, status: str) -> dict[str, Any]:
        options = self._work.options
        return {
            "id": f"resp_{self._identity.id}",
            "object": "response",
            "created_at": self._identity.created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": self.form.instructions,
            "max_output_tokens": self.form.max_output_tokens,
            "model": self._identity.service.settings.model,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": options.temperature if options.do_sample else 0.0,
            "text": {"format": self.form.text.format.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": "none",
            "tools": [],
            "top_p": options.top_p,
            "metadata": {},
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
