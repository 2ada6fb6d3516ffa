"""Compare servers of OpenAI's API under load: tokens per second, time to first token, reuse of a common prompt.

The servers run already, each in an environment of its own (docs/serving.md says how each was started). They are asked
in turns, so that what else the machine does falls on all of them.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
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


def turns(servers: Sequence[Server], repeats: int) -> Iterator[tuple[int, Server]]:
    """Yield the servers `repeats` times, with the number of the turn; every other time the last one is the first.

    Prompts differ from turn to turn, so that no server has read one before.
    """
    for turn in range(repeats):
        yield from ((turn, each) for each in servers[:: 1 - turn % 2 * 2])


def throughput(servers: Sequence[Server], streams: Sequence[int], requests: int, repeats: int, seed: int) -> None:
    """Ask every server with each number of streams, and keep the turn with the median rate."""
    for number in streams:
        load = Load(
            requests=max(requests, 2 * number),
            concurrency=number,
            prompt_words=_PROMPT_WORDS,
            new_tokens=_NEW_TOKENS,
            spread=_SPREAD,
        )
        figures: dict[str, list[dict[str, Any]]] = {each.name: [] for each in servers}
        for turn, each in turns(servers, repeats):
            asked = replace(load, seed=seed + number + 1000 * (turn + 1))
            figures[each.name].append(each.asked(asked).as_json())
        for each in servers:
            rates = [one["tokens_per_second"] for one in figures[each.name]]
            each.found[f"{number} streams"] = sorted(figures[each.name], key=lambda one: one["tokens_per_second"])[
                len(rates) // 2
            ]
            spread = f"{min(rates):.0f} to {max(rates):.0f}"
            print(f"{each.name:24} {number:3} streams: {median(rates):6.1f} tokens/s ({spread})", flush=True)


def first_token(servers: Sequence[Server], repeats: int, seed: int) -> None:
    """Measure the time to the first token of a long prompt, and of a second prompt that shares its beginning."""
    times: dict[str, list[float]] = {each.name: [] for each in servers}
    ratios: dict[str, list[float]] = {each.name: [] for each in servers}
    for turn, each in turns(servers, repeats):
        long = Load(requests=1, concurrency=1, prompt_words=_LONG_WORDS, new_tokens=1, seed=seed + 100 + turn)
        times[each.name] += [one.first for one in each.asked(long).requests]
        shared = Load(
            requests=2, concurrency=1, prompt_words=8, shared_words=_SHARED_WORDS, new_tokens=1, seed=seed + 200 + turn
        )
        first, second = each.asked(shared).requests
        ratios[each.name].append(second.first / first.first)
    for each in servers:
        found, ratio = times[each.name], median(ratios[each.name])
        each.found["first token, long prompt"] = median(found)
        each.found["second of a shared prompt over the first"] = ratio
        print(
            f"{each.name:24} first token of {_LONG_WORDS} words: {median(found):.3f} s ({min(found):.3f} to "
            f"{max(found):.3f}); second request of a shared prompt: {ratio:.2f} of the first's",
            flush=True,
        )


def decoding(servers: Sequence[Server], repeats: int, seed: int) -> None:
    """Measure the time of a token of a single stream."""
    times: dict[str, list[float]] = {each.name: [] for each in servers}
    for turn, each in turns(servers, repeats):
        load = Load(requests=1, concurrency=1, prompt_words=16, new_tokens=_NEW_TOKENS, seed=seed + turn)
        times[each.name].append(each.asked(load).as_json()["time_per_token"]["p50"])
    for each in servers:
        found = times[each.name]
        each.found["time per token"] = median(found)
        print(
            f"{each.name:24} one stream: {median(found) * 1e3:.1f} ms a token ({min(found) * 1e3:.1f} to "
            f"{max(found) * 1e3:.1f})",
            flush=True,
        )


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
    parser.add_argument("--repeats", type=int, default=3, help="turns of each server, of which the median counts")
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
        throughput(servers, given.streams, given.requests, given.repeats, given.seed)
    except EngineError as error:
        raise SystemExit(one_line(error)) from error
    if given.json:
        print(json.dumps({each.name: each.found for each in servers}, indent=1))


if __name__ == "__main__":
    main()
