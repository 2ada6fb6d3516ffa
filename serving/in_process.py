"""A request to an ASGI application of this process, without a socket; the answer comes piece by piece."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message


@dataclass(frozen=True)
class Answered:
    """An answer that comes.

    Attributes:
        status: HTTP status.
        pieces: Of the body, as they are sent.
    """

    status: int
    pieces: AsyncGenerator[bytes, None]

    async def body(self) -> bytes:
        """Return the whole body."""
        return b"".join([piece async for piece in self.pieces])


@asynccontextmanager
async def posted(app: ASGIApp, path: str, body: bytes, headers: Mapping[str, str]) -> AsyncIterator[Answered]:
    """Send a body of JSON; the application sees its client leave when the block ends.

    Args:
        app: Whom to ask.
        path: Of the endpoint.
        body: What to send.
        headers: Besides type and length of the body.
    """
    told: asyncio.Queue[Message | None] = asyncio.Queue()
    left, requests = asyncio.Event(), [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if requests:
            return requests.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def run() -> None:
        try:
            await app(_scope(path, body, headers), receive, told.put)
        finally:
            told.put_nowait(None)

    async def pieces() -> AsyncGenerator[bytes, None]:
        while (message := await told.get()) is not None:
            yield message.get("body", b"")
        await running  # a fault of the application is the caller's

    running = asyncio.create_task(run())
    try:
        start = await told.get()
        if start is None:
            await running
        assert start is not None, "an application answers or raises"
        yield Answered(start["status"], pieces())
    finally:
        left.set()
        await asyncio.gather(running, return_exceptions=True)


def _scope(path: str, body: bytes, headers: Mapping[str, str]) -> dict[str, Any]:
    """Return what ASGI tells an application of a request."""
    kept = {name.lower(): value for name, value in headers.items() if name.lower() not in _OF_THE_BODY}
    of_the_body = {"content-type": "application/json", "content-length": str(len(body))}
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in (kept | of_the_body).items()],
        "client": None,
        "server": None,
    }


_OF_THE_BODY = ("content-type", "content-length", "transfer-encoding", "content-encoding", "expect")
