"""A request on its way through the engine: from sequences to results or to a stream of events."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from fastapi import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from spike_export.artifacts.errors import EngineError
from spike_export.engines.generation.generated_text import Generation, Piece, joined
from spike_export.serving.openai.errors import failed, timed_out
from spike_export.serving.openai.json_text import event_bytes, json_bytes
from spike_export.serving.openai.sampling_form import SamplingForm
from spike_export.serving.scheduling.answer import Answer, Progress
from spike_export.serving.scheduling.batch import Work
from spike_export.serving.service import Service

_LAST_EVENT_SECONDS = 1.0
"""How long a client may take to read that the time for its answer is up."""


@dataclass(frozen=True)
class Identity:
    """What every part of an answer says of it."""

    kind: str
    service: Service
    prefix: str
    id: str = field(default_factory=lambda: uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self, kind: str | None = None) -> dict[str, Any]:
        """Return the fields in front of an answer, or of a chunk of it."""
        return {
            "id": f"{self.prefix}-{self.id}",
            "object": kind or self.kind,
            "created": self.created,
            "model": self.service.settings.model,
            "system_fingerprint": self.service.model.fingerprint,
        }


class JsonAnswer(JSONResponse):
    """A response of JSON."""

    def render(self, content: Any) -> bytes:
        """See `Response`."""
        return json_bytes(content)


class EventStream(Response):
    """A response of server-sent events; the answer that they tell of is cancelled at once when the client leaves.

    A client that does not read is left when the time for the answer is up.
    """

    def __init__(self, answer: Answer, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self._answer, self._events = answer, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See `Response`."""
        with self._answer, suppress(TimeoutError):
            async with asyncio.timeout_at(self._answer.deadline + _LAST_EVENT_SECONDS):
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                await first_of(self._send_all(send), gone(receive))

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def gone(receive: Receive) -> None:
    """Wait until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def first_of(work: Any, end: Any) -> Any:
    """Return the result of `work`, or None where `end` came first; the other one is cancelled."""
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(end)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def answered(
    service: Service,
    request: Request,
    works: Sequence[Work],
    whole: Callable[[Sequence[Generation], Answer], Any],
    events: Callable[[Answer], AsyncIterator[bytes]] | None,
) -> Response:
    """Answer a request with what follows its prompts.

    Args:
        service: What serves.
        request: Whose client may leave.
        works: The sequences.
        whole: Makes the body of JSON from all results, in the order of `works`.
        events: Makes the events of a stream; None where the client wants one body.

    Raises:
        RequestError: The engine does not take the request, fails, or needs too long.
    """
    if events is not None:
        answer = submitted(service, works)
        return EventStream(answer, guarded(service, events(answer)))
    found, answer = await results(service, request, works)
    return JsonAnswer(whole(found, answer) if found else {})  # without a client nobody reads it


def submitted(service: Service, works: Sequence[Work]) -> Answer:
    """Give sequences to the engine.

    Raises:
        RequestError: It does not take them now.
    """
    try:
        return Answer(service.worker, works, service.settings.timeout)
    except EngineError as error:
        raise failed(error) from error


async def results(service: Service, request: Request, works: Sequence[Work]) -> tuple[list[Generation], Answer]:
    """Return what followed each prompt, and the answer it came with.

    The list is empty where the client has left before.

    Raises:
        RequestError: The engine does not take the request, fails, or needs too long.
    """
    with submitted(service, works) as answer:
        found = await first_of(_collected(service, answer, works), gone(request.receive))
    return found or [], answer


async def _collected(service: Service, answer: Answer, works: Sequence[Work]) -> list[Generation]:
    pieces: list[list[Piece]] = [[] for _ in works]
    try:
        async for number, piece in observed(service, answer, works):
            pieces[number].append(piece)
    except TimeoutError as error:
        raise timed_out(service.settings.timeout) from error
    except EngineError as error:
        raise failed(error) from error
    return [joined(own, len(work.prompt)) for own, work in zip(pieces, works, strict=True)]


async def guarded(service: Service, events: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """Pass events on; end them with an error's event where the engine fails."""
    try:
        async for event in events:
            yield event
    except TimeoutError:
        yield event_bytes(timed_out(service.settings.timeout).body)
    except EngineError as error:
        yield event_bytes(failed(error).body)


def followed(service: Service, answer: Answer, works: Sequence[Work]) -> AsyncIterator[tuple[int, Piece | Progress]]:
    """Return the progress of an answer's prompts, and its pieces, counted in the metrics."""
    return service.metrics.observed(answer, [len(work.prompt) for work in works])


async def observed(service: Service, answer: Answer, works: Sequence[Work]) -> AsyncIterator[tuple[int, Piece]]:
    """Yield an answer's pieces, counted in the metrics."""
    async for number, piece in followed(service, answer, works):
        if isinstance(piece, Piece):
            yield number, piece


def told_progress(progress: Progress) -> dict[str, Any]:
    """Return llama.cpp's field of how far a prompt has been read."""
    figures = {"total": progress.tokens, "cache": progress.reused, "processed": progress.read}
    return {"prompt_progress": figures | {"time_ms": round(progress.seconds * 1e3)}}


def counts(works: Sequence[Work], generated: int, answer: Answer, form: SamplingForm) -> dict[str, Any]:
    """Return the fields of an answer that count: `usage`, and `timings` where the request asks for them.

    Args:
        works: The sequences of a request, all answers to a prompt behind each other.
        generated: Tokens of all answers.
        answer: What the sequences have come to.
        form: Says how many answers each prompt gets; each prompt counts once.
    """
    prompt_tokens = sum(len(work.prompt) for work in works[:: form.choices])
    cached = sum(answer.reused[:: form.choices])
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": prompt_tokens + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    if not form.timings_per_token:
        return {"usage": usage}
    return {"usage": usage, "timings": timings(prompt_tokens, cached, generated, answer)}


def timings(prompt_tokens: int, cached: int, generated: int, answer: Answer) -> dict[str, Any]:
    """Return llama.cpp's `timings`; a prompt's time is that to the first token, waiting included."""
    first = answer.last if answer.first is None else answer.first
    return {
        "cache_n": cached,
        **_speed("prompt", prompt_tokens - cached, first - answer.begun),
        **_speed("predicted", generated, answer.last - first),
    }


def _speed(name: str, tokens: int, seconds: float) -> dict[str, float]:
    return {
        f"{name}_n": tokens,
        f"{name}_ms": seconds * 1e3,
        f"{name}_per_token_ms": seconds * 1e3 / max(1, tokens),
        f"{name}_per_second": tokens / seconds if seconds else 0.0,
    }
