"""The load generator against a real server: what it counts is what the server counted."""

import json
from pathlib import Path

import pytest

from spike_export.artifacts.errors import EngineError
from spike_export.serving.load import Load, percentiles, run_load
from tests.support.tiny_cli_models import call
from tests.support.tiny_service import Running


def test_figures_are_those_of_the_server(server: Running) -> None:
    report = run_load(f"{server.url}/v1/", Load(requests=5, concurrency=3, prompt_words=4, new_tokens=6))
    figures = report.as_json()
    assert (figures["requests"], figures["errors"], figures["generated_tokens"]) == (5, 0, 30)
    assert figures["prompt_tokens"] > 5 * 4
    assert figures["tokens_per_second"] == pytest.approx(30 / report.seconds)
    for request in report.requests:
        assert 0 < request.first <= request.whole <= report.seconds


def test_lengths_differ_by_the_spread_and_chats_are_asked_too(server: Running) -> None:
    load = Load(requests=12, concurrency=4, prompt_words=10, new_tokens=8, spread=0.5, chat=True)
    sizes = [(len(prompt.split()) - 1, new_tokens) for prompt, new_tokens in load.calls()]
    words, tokens = zip(*sizes, strict=True)
    assert 5 <= min(words) < max(words) <= 15
    assert 4 <= min(tokens) < max(tokens) <= 12
    report = run_load(server.url, load)
    assert sum(request.tokens for request in report.answered) == sum(new_tokens for _, new_tokens in sizes)
    with pytest.raises(EngineError, match="spread is 1"):
        Load(spread=1)


def test_refusals_are_counted(server: Running) -> None:
    report = run_load(server.url, Load(requests=2, concurrency=1, prompt_words=400, new_tokens=6))
    assert [request.error for request in report.requests] == ["status 400"] * 2
    assert report.tokens_per_second == 0


def test_percentiles() -> None:
    assert percentiles([float(value) for value in range(101)]) == {"p50": 50, "p90": 90, "p99": 99}
    assert percentiles([2.0]) == {"p50": 2, "p90": 2, "p99": 2}
    assert percentiles([]) == {"p50": None, "p90": None, "p99": None}


def test_the_command_serves_a_bundle_meanwhile(bundle: Path) -> None:
    small = ("--requests", "2", "--prompt-words", "3", "--new-tokens", "3", "--threads", "1", "--concurrency", "2")
    (figures,) = json.loads(call("bench", bundle, *small, "--json").out)
    assert (figures["concurrency"], figures["generated_tokens"]) == (2, 6)
    assert "there is no server" in call("bench", "http://127.0.0.1:9", *small).error
    with pytest.raises(EngineError, match="requests is 0"):
        Load(requests=0)
