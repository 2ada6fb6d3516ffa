"""Compare servers of OpenAI's API under load: tokens per second, time to first token, reuse of a common prompt.

The servers run already, each in an environment of its own (docs/serving.md says how each was started). They are asked
in turns, so that what else the machine does falls on all of them.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from spike_export.artifacts.errors import EngineError, one_line
from spike_export.serving.load import Load, Report, run_load

_PROMPT_WORDS, _NEW_TOKENS, _SPREAD = 130, 64, 0.75
"""Prompts of 33 to 228 words, which are about as many tokens, and answers of 16 to 112 tokens."""

_LONG_WORDS, _SHARED_WORDS = 510, 300


@dataclass
class Server:
    """A server that runs.

    Attributes:
        url: Its address.
        chat: Whether it has chats only.
    """

    name: str
    url: str
    chat: bool
    found: dict[str, Any] = field(default_factory=dict)

    def asked(self, load: Load) -> Report:
        """Return what came of a load.

        Raises:
            EngineError: A request failed.
        """
        report = run_load(self.url, replace(load, chat=self.chat))
        errors = [request.error for request in report.requests if request.error is not None]
        if errors:
            raise EngineError(f"{self.name}: {errors[0]}")
        return report


def server(text: str, *, chat: bool) -> Server:
    """Return the server of NAME=URL."""
    name, _, url = text.partition("=")
    return Server(name, url, chat)


def throughput(servers: Sequence[Server], streams: Sequence[int], requests: int, seed: int) -> None:
    """Ask every server with each number of streams, the servers in turns."""
    for number in streams:
        load = Load(
            requests=max(requests, 2 * number),
            concurrency=number,
            prompt_words=_PROMPT_WORDS,
            new_tokens=_NEW_TOKENS,
            spread=_SPREAD,
            seed=seed + number,
        )
        for each in servers:
            figures = each.asked(load).as_json()
            each.found[f"{number} streams"] = figures
            print(f"{each.name:24} {number:3} streams: {figures['tokens_per_second']:7.1f} tokens/s", flush=True)


def first_token(servers: Sequence[Server], repeats: int, seed: int) -> None:
    """Measure the time to the first token of a long prompt, and of a second prompt that shares its beginning."""
    for each in servers:
        long = Load(requests=repeats, concurrency=1, prompt_words=_LONG_WORDS, new_tokens=1, seed=seed)
        each.found["first token, long prompt"] = median(one.first for one in each.asked(long).requests)
        ratios = []
        for number in range(1, repeats + 1):
            shared = Load(
                requests=2, concurrency=1, prompt_words=8, shared_words=_SHARED_WORDS, new_tokens=1, seed=seed + number
            )
            first, second = each.asked(shared).requests
            ratios.append(second.first / first.first)
        each.found["second of a shared prompt over the first"] = median(ratios)
        print(
            f"{each.name:24} first token of {_LONG_WORDS} words: {each.found['first token, long prompt']:.3f} s; "
            f"second request of a shared prompt: {median(ratios):.2f} of the first's",
            flush=True,
        )


def decoding(servers: Sequence[Server], requests: int, seed: int) -> None:
    """Measure the time of a token of a single stream."""
    for each in servers:
        load = Load(requests=requests, concurrency=1, prompt_words=16, new_tokens=_NEW_TOKENS, seed=seed)
        each.found["time per token"] = each.asked(load).as_json()["time_per_token"]["p50"]
        print(f"{each.name:24} one stream: {each.found['time per token'] * 1e3:.1f} ms a token", flush=True)


def main() -> None:
    """Compare the servers that are given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "servers", nargs="*", metavar="NAME=URL", help="a server; the first one is compared with others"
    )
    parser.add_argument(
        "--chat-server", action="append", default=[], metavar="NAME=URL", help="one that has chats only"
    )
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--requests", type=int, default=16, help="for each number of streams; twice as many at least")
    parser.add_argument("--repeats", type=int, default=3, help="of the times to the first token")
    parser.add_argument(
        "--seed",
        type=int,
        default=time.time_ns() % 2**31,
        help="of the prompts (default: another one each time, so that no server has read them before)",
    )
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    servers = [server(text, chat=False) for text in given.servers]
    servers += [server(text, chat=True) for text in given.chat_server]
    try:
        for each in servers:
            each.asked(Load(requests=1, concurrency=1, prompt_words=8, new_tokens=4, seed=given.seed - 1))  # warm
        decoding(servers, given.repeats, given.seed)
        first_token(servers, given.repeats, given.seed)
        throughput(servers, given.streams, given.requests, given.seed)
    except EngineError as error:
        raise SystemExit(one_line(error)) from error
    if given.json:
        print(json.dumps({each.name: each.found for each in servers}, indent=1))


if __name__ == "__main__":
    main()
