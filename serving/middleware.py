"""What every request passes before it is understood: its number and its log line, its key, the size of its body."""

import asyncio
import hmac
import re
import time
from collections.abc import Sequence
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from spike_export.serving.openai.errors import RequestError
from spike_export.serving.openai.exchange import JsonAnswer
from spike_export.serving.service import Log

OPEN_PATHS = frozenset(
    {
        *("/", "/health", "/ready", "/v1/health", "/v1/health/live", "/v1/health/ready", "/models"),
        *("/v2/health/live", "/v2/health/ready"),
    }
)
"""Answered without a key: what a load balancer asks, the page, which asks its reader for a key, and llama.cpp's list of
models, which its clients read before they show one. OpenAI's `/v1/models` needs a key."""

BODY_SECONDS = 60.0
"""Longest time for a body to arrive."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class RequestRecord:
    """Gives each request an id, its client's if it is usable, and writes a line when it has been answered."""

    def __init__(self, app: ASGIApp, log: Log) -> None:
        self._app, self._log = app, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid4().hex
        begun, status = time.perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            taken = round((time.perf_counter() - begun) * 1e3, 1)
            fields = {"id": request_id, "method": scope["method"], "path": scope["path"], "status": status}
            self._log("request", {**fields, "milliseconds": taken})


class KeyCheck:
    """Refuses requests that show none of the keys; how long a comparison takes does not depend on the key shown."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app, self._keys = app, [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._shows_key(scope):
            await self._app(scope, receive, send)
            return
        headers = {"WWW-Authenticate": "Bearer"}
        error = RequestError("the API key is missing or wrong", 401, "authentication_error", None, "invalid_api_key")
        await JsonAnswer(error.body, error.status, headers)(scope, receive, send)

    def _shows_key(self, scope: Scope) -> bool:
        """Return whether a key stands in `Authorization: Bearer`, or in `X-Api-Key` as some clients send it."""
        headers = Headers(scope=scope)
        scheme, _, shown = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            shown = headers.get("x-api-key", "")
        matches = [hmac.compare_digest(shown.strip().encode(), key) for key in self._keys]
        return any(matches)


class AnyOrigin(CORSMiddleware):
    """Lets pages of every origin ask, in the words of llama.cpp's server: each origin by its name, all headers by `*`.

    Browsers do not count `Authorization` among all headers: pages that show a key need their origin named.
    """

    def __init__(self, app: ASGIApp) -> None:
        methods = ("GET", "POST", "DELETE", "OPTIONS")
        super().__init__(app, allow_origins=["*"], allow_methods=methods, allow_headers=["*"], allow_credentials=True)

    def preflight_response(self, request_headers: Headers) -> Response:
        """See `CORSMiddleware`."""
        answer = super().preflight_response(request_headers)
        answer.headers["Access-Control-Allow-Headers"] = "*"
        return answer


class BodyLimit:
    """Refuses bodies that are too large, before they are read where their length is told, and those that never end."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        told = Headers(scope=scope).get("content-length", "")
        if told.isdecimal() and int(told) > self._most:
            await self._refuse(scope, receive, send)
            return
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await self._read(receive)
        except TimeoutError:
            error = RequestError(f"the body was not complete after {BODY_SECONDS:g} s", 408, code="body_timeout")
            await _answer_and_close(error, scope, receive, send)
            return
        if body is None:
            return
        if len(body) > self._most:
            await self._refuse(scope, receive, send)
        else:
            await self._app(scope, _replayed(body, receive), send)

    async def _read(self, receive: Receive) -> bytes | None:
        """Return the body, or as much as is too much; None where the client has left before."""
        parts, size = [], 0
        while size <= self._most:
            message = await receive()
            if message["type"] != "http.request":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if not message.get("more_body", False):
                break
        return b"".join(parts)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = RequestError(f"the body has more than {self._most} bytes", 413, code="body_too_large")
        await _answer_and_close(error, scope, receive, send)


async def _answer_and_close(error: RequestError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request whose body has not been read to its end."""
    await JsonAnswer(error.body, error.status, {"Connection": "close"})(scope, receive, send)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the whole body first."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
