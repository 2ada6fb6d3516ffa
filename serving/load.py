"""Load on a server of OpenAI's API: how many tokens come per second, and how long a client waits for them.

The clients are coroutines of this process, each of which streams one request after another. What a client waits for is
taken from the events as they arrive; how many tokens they were, from the usage that the server tells at the end.
"""

import asyncio
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

from spike_export.artifacts.errors import EngineError, one_line

_WORDS = (
    "the of and a in is for on that with as by this from are or an be at which model can data not will have when new "
    "light water city river music engine paper stone garden window winter summer number letter answer question people"
)


@dataclass(frozen=True, kw_only=True)
class Load:
    """What the clients ask for.

    Attributes:
        requests: Requests of all clients together.
        concurrency: Clients at once.
        prompt_words: Words of a prompt, about as many tokens; all prompts differ.
        shared_words: Words that all prompts begin with, besides.
        new_tokens: Tokens of every answer: clients ask to ignore its end.
        spread: Share by which words of prompts and tokens of answers differ, at most, up and down.
        chat: Whether the prompts are messages of chats, for servers without completions.
        seed: Of the prompts.
    """

    requests: int = 32
    concurrency: int = 8
    prompt_words: int = 128
    shared_words: int = 0
    new_tokens: int = 64
    spread: float = 0.0
    chat: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("requests", "concurrency", "prompt_words", "new_tokens"):
            if getattr(self, name) < 1:
                raise EngineError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.shared_words < 0:
            raise EngineError(f"shared_words is {self.shared_words}; expected at least 0")
        if not 0 <= self.spread < 1:
            raise EngineError(f"spread is {self.spread}; expected at least 0 and less than 1")

    def calls(self) -> list[tuple[str, int]]:
        """Return a prompt and the tokens of its answer for each request."""
        draw, words = random.Random(self.seed), _WORDS.split()
        shared = " ".join(draw.choices(words, k=self.shared_words))

        def about(count: int) -> int:
            return max(1, round(count * draw.uniform(1 - self.spread, 1 + self.spread)))

        return [
            (f"{shared} {number} {' '.join(draw.choices(words, k=about(self.prompt_words)))}", about(self.new_tokens))
            for number in range(self.requests)
        ]


@dataclass(frozen=True)
class Request:
    """One request as its client saw it; times in seconds.

    Attributes:
        first: From the request to the first text.
        whole: From the request to the last event.
        tokens: Tokens of the answer.
        error: What went wrong; None for nothing.
    """

    first: float = 0.0
    whole: float = 0.0
    prompt_tokens: int = 0
    tokens: int = 0
    error: str | None = None

    @property
    def per_token(self) -> float:
        """Mean time between two tokens."""
        return (self.whole - self.first) / max(1, self.tokens - 1)


@dataclass(frozen=True)
class Report:
    """What a load came to."""

    load: Load
    seconds: float
    requests: Sequence[Request]

    @property
    def answered(self) -> list[Request]:
        """Requests that were answered."""
        return [request for request in self.requests if request.error is None]

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all answers over the time of all requests."""
        return sum(request.tokens for request in self.answered) / self.seconds

    def as_json(self) -> dict[str, Any]:
        """Return the figures as values for JSON; times in seconds."""
        answered = self.answered
        errors = [request.error for request in self.requests if request.error is not None]
        return {
            "concurrency": self.load.concurrency,
            "requests": len(self.requests),
            "errors": len(errors),
            "first_error": errors[0] if errors else None,
            "seconds": self.seconds,
            "prompt_tokens": sum(request.prompt_tokens for request in answered),
            "generated_tokens": sum(request.tokens for request in answered),
            "tokens_per_second": self.tokens_per_second,
            "time_to_first_token": percentiles([request.first for request in answered]),
            "time_per_token": percentiles([request.per_token for request in answered if request.tokens > 1]),
        }


def percentiles(values: Sequence[float]) -> Mapping[str, float | None]:
    """Return the 50th, 90th and 99th percentile, by linear interpolation; None where there is no value."""
    if not values:
        return dict.fromkeys(("p50", "p90", "p99"))
    cuts = quantiles(values, n=100, method="inclusive") if len(values) > 1 else [values[0]] * 99
    return {"p50": cuts[49], "p90": cuts[89], "p99": cuts[98]}


def run_load(url: str, load: Load, *, model: str | None = None, api_key: str | None = None) -> Report:
    """Ask a server and return what came of it.

    Args:
        url: Address of the server; `/v1` is added where it is missing.
        load: What to ask for.
        model: Name of the model; the first of the server's list when omitted.
        api_key: Key to show.

    Raises:
        EngineError: The server does not answer at all.
    """
    return asyncio.run(_run(url.rstrip("/").removesuffix("/v1"), load, model, api_key))


async def _run(url: str, load: Load, model: str | None, api_key: str | None) -> Report:
    import httpx2

    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    # A connection for each request: a server may close a kept one just when it is used again, as llama-server does.
    limits = httpx2.Limits(max_connections=load.concurrency + 1, max_keepalive_connections=0)
    async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=600, limits=limits) as client:
        name = model or await _first_model(client, url)
        waiting = iter(load.calls())
        found: list[Request] = []

        async def ask_on() -> None:
            for prompt, new_tokens in waiting:
                found.append(await _ask(client, name, prompt, new_tokens, chat=load.chat))

        begun = time.perf_counter()
        await asyncio.gather(*(ask_on() for _ in range(load.concurrency)))
        return Report(load, time.perf_counter() - begun, found)


async def _first_model(client: Any, url: str) -> str:
    import httpx2

    try:
        answer = await client.get("/v1/models")
        answer.raise_for_status()
        name: str = answer.json()["data"][0]["id"]
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, LookupError, TypeError) as error:
        raise EngineError(
            f"{url}: there is no server of OpenAI's API ({one_line(error)}); check the address"
        ) from error
    return name


async def _ask(client: Any, model: str, prompt: str, new_tokens: int, *, chat: bool) -> Request:
    import httpx2

    path = "/v1/chat/completions" if chat else "/v1/completions"
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    body = {"model": model, **asked, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    begun, first, chunks = time.perf_counter(), None, 0
    usage: dict[str, Any] = {}
    try:
        async with client.stream("POST", path, json=body) as answer:
            if answer.status_code != 200:
                return Request(error=f"status {answer.status_code}")
            async for line in answer.aiter_lines():
                event = _event(line)
                if event.get("error"):
                    return Request(error=str(event["error"]))
                usage = event.get("usage") or usage
                if any(_text(choice) for choice in event.get("choices", ())):
                    chunks += 1
                    first = first or time.perf_counter()
    except (httpx2.HTTPError, ValueError) as error:
        return Request(error=one_line(error))
    ended = time.perf_counter()
    tokens = usage.get("completion_tokens", chunks)
    return Request((first or ended) - begun, ended - begun, usage.get("prompt_tokens", 0), tokens)


def _text(choice: Mapping[str, Any]) -> Any:
    return choice.get("text") or (choice.get("delta") or {}).get("content")


def _event(line: str) -> dict[str, Any]:
    data = line.removeprefix("data:").strip()
    if not line.startswith("data:") or data == "[DONE]":
        return {}
    event: dict[str, Any] = json.loads(data)
    return event
