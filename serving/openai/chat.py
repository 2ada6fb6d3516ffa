"""`/v1/chat/completions`: the next message of a chat."""

import json
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Annotated, Any, Literal
from uuid import uuid4

from fastapi import Request
from pydantic import ConfigDict, Field
from starlette.responses import Response

from spike_export.engines.generation.generated_text import Generation, Piece
from spike_export.serving.openai.errors import RequestError
from spike_export.serving.openai.exchange import Identity, answered, counts, followed, told_progress
from spike_export.serving.openai.form import MOST_MESSAGES, Form, needed_if
from spike_export.serving.openai.json_text import DONE, event_bytes
from spike_export.serving.openai.logprobs import chat_logprob
from spike_export.serving.openai.requests import encoded, new_tokens, require_model, works_of
from spike_export.serving.openai.sampling_form import SamplingForm
from spike_export.serving.openai.tool_calls import (
    Call,
    CallReader,
    Split,
    ToolFormat,
    call_reader,
    required_call,
    tool_format,
)
from spike_export.serving.scheduling.answer import Answer, Progress
from spike_export.serving.scheduling.batch import Work
from spike_export.serving.service import Service

_TEXT_PARTS = ("text", "input_text", "output_text")


class TextPart(Form):
    """A part of a message; parts other than text are refused."""

    type: Annotated[str, Field(json_schema_extra={"enum": list(_TEXT_PARTS)})]
    text: str = ""


class Message(Form):
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
                if part.type not in _TEXT_PARTS:
                    raise RequestError(f"a message has content of type {part.type!r}; expected text", param="messages")
            fields["content"] = "".join(part.text for part in self.content)
        return {"content": ""} | fields | self._calls()

    def _calls(self) -> dict[str, Any]:
        """Return earlier calls of functions with their arguments as values, which is what chat templates write."""
        calls = (self.model_extra or {}).get("tool_calls")
        if not isinstance(calls, list):
            return {}
        return {"tool_calls": [_with_arguments(call) for call in calls]}


def plain_chat(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return messages as chat templates take them.

    Raises:
        RequestError: A part is no text, or the chat ends with two answers in a row: templates and models know no such.
    """
    if [message.role for message in messages[-2:]] == ["assistant", "assistant"]:
        raise RequestError("the chat ends with two messages of the assistant; join them", param="messages")
    return [message.plain() for message in messages]


def _with_arguments(call: Any) -> Any:
    try:
        function = call["function"]
        return call | {"function": function | {"arguments": json.loads(function["arguments"])}}
    except (LookupError, TypeError, ValueError, RecursionError):
        return call


class Function(Form):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Form):
    """OpenAI's envelope of a function."""

    type: Literal["function"]
    function: Function


class NamedFunction(Form):
    """A function by its name."""

    name: str


class NamedTool(Form):
    """A function that has to be called."""

    type: Literal["function"]
    function: NamedFunction


class ChatForm(SamplingForm):
    """The body of a request."""

    model_config = ConfigDict(
        json_schema_extra=needed_if({"top_logprobs": {"type": "integer"}}, {"logprobs": {"const": True}})
    )

    messages: Annotated[list[Message], Field(min_length=1), MOST_MESSAGES]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None

    @property
    def functions(self) -> list[dict[str, Any]]:
        """The functions that may be called, as chat templates take them."""
        if self.tool_choice == "none":
            return []
        return [tool.model_dump(exclude_none=True) for tool in self.tools or ()]

    @property
    def required(self) -> list[dict[str, Any]]:
        """Functions one of which has to be called.

        Raises:
            RequestError: There is none.
        """
        if self.tool_choice in (None, "none", "auto"):
            return []
        functions = [tool["function"] for tool in self.functions]
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            functions = [each for each in functions if each["name"] == name]
        if not functions:
            raise RequestError("tool_choice names no function of tools", param="tool_choice")
        return functions

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
        required, tools = form.required, self._tool_format(form)
        chat = plain_chat(form.messages)
        prompts = await encoded(self._service, [chat], "messages", form.functions)
        asked, param = form.size
        size = new_tokens(self._service, len(prompts[0]), asked, None, param)
        logprobs = (form.top_logprobs or 0) if form.logprobs else None
        grammar = required_call(tools, required) if tools is not None and required else None
        works = await works_of(self._service, form, prompts, [size], logprobs, grammar)
        identity = Identity("chat.completion", self._service, "chatcmpl")

        def whole(found: Sequence[Generation], answer: Answer) -> dict[str, Any]:
            choices = [self._choice(number, each, self._reader(form, tools)) for number, each in enumerate(found)]
            generated = sum(len(each.token_ids) for each in found)
            return identity.head() | {"choices": choices} | counts(works, generated, answer, form)

        def events(answer: Answer) -> AsyncIterator[bytes]:
            return self._events(form, identity, answer, works, tools)

        return await answered(self._service, request, works, whole, events if form.stream else None)

    def _tool_format(self, form: ChatForm) -> ToolFormat | None:
        """Return how the model writes calls; None where the request allows none.

        Raises:
            RequestError: The model knows no tools.
        """
        if not form.functions:
            return None
        found = tool_format(str(self._service.model.tokenizer.chat_template))
        if found is None:
            raise RequestError("the model's chat template has no tools of a known form; leave tools out", param="tools")
        return found

    def _reader(self, form: ChatForm, tools: ToolFormat | None) -> CallReader | None:
        return None if tools is None else call_reader(tools, [tool["function"]["name"] for tool in form.functions])

    def _choice(self, number: int, found: Generation, reader: CallReader | None) -> dict[str, Any]:
        text, calls = (found.text, []) if reader is None else _read_all(reader, found.text)
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
        if calls:
            message["tool_calls"] = [_call(call) for call in calls]
        return {
            "index": number,
            "message": message,
            "logprobs": self._logprobs(found.logprobs),
            "finish_reason": _reason(found.finish_reason, bool(calls)),
        }

    async def _events(
        self, form: ChatForm, identity: Identity, answer: Answer, works: Sequence[Work], tools: ToolFormat | None
    ) -> AsyncIterator[bytes]:
        head, generated = identity.head("chat.completion.chunk"), 0
        spellings = [_Spelling(number, self._reader(form, tools)) for number in range(len(works))]
        for number in range(len(works)):
            yield event_bytes(head | {"choices": [_delta(number, {"role": "assistant", "content": None})]})
        async for number, piece in followed(self._service, answer, works):
            if isinstance(piece, Progress):
                if form.return_progress:
                    yield event_bytes(head | {"choices": [_delta(number, {})]} | told_progress(piece))
                continue
            generated += 1
            logprobs = self._logprobs(None if piece.logprob is None else (piece.logprob,))
            for choice in spellings[number].choices(piece, logprobs):
                yield event_bytes(head | {"choices": [choice]})
        if form.usage_in_stream:
            yield event_bytes(head | {"choices": []} | counts(works, generated, answer, form))
        yield DONE

    def _logprobs(self, found: Sequence[Any] | None) -> dict[str, Any] | None:
        if not found:
            return None
        text = self._service.model.tokenizer.backend_tokenizer
        return {"content": [chat_logprob(each, text) for each in found], "refusal": None}


class _Spelling:
    """The choices of one streamed answer: a piece's text, and the calls that are complete with it."""

    def __init__(self, number: int, reader: CallReader | None) -> None:
        self._number, self._reader, self._called = number, reader, 0

    def choices(self, piece: Piece, logprobs: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
        """Yield what a piece adds, and then, with nothing beside it, why the answer has ended."""
        text, calls = self._split(piece)
        spelled = [{"index": self._called + place, **_call(call)} for place, call in enumerate(calls)]
        self._called += len(calls)
        delta: dict[str, Any] = {"content": text} if text else {}
        delta |= {"tool_calls": spelled} if spelled else {}
        if delta or logprobs is not None:
            yield _delta(self._number, delta, None, logprobs)
        if piece.finish_reason is not None:
            yield _delta(self._number, {}, _reason(piece.finish_reason, self._called > 0))

    def _split(self, piece: Piece) -> Split:
        if self._reader is None:
            return piece.text, []
        if piece.finish_reason is None:
            return self._reader.feed(piece.text)
        return _read_all(self._reader, piece.text)


def _read_all(reader: CallReader, text: str) -> Split:
    """Return the rest of a text and of its calls."""
    begin, first = reader.feed(text)
    end, last = reader.finish()
    return begin + end, [*first, *last]


def _call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid4().hex}", "type": "function", "function": function}


def _reason(reason: str | None, called: bool) -> str | None:
    return "tool_calls" if called and reason == "stop" else reason


def _delta(
    number: int, delta: dict[str, Any], reason: str | None = None, logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
