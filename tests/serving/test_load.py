"""The load generator against a real server: what it counts is what the server counted."""

import json
import shutil
from pathlib import Path

import pytest

from spike_export.artifacts.errors import EngineError
from spike_export.artifacts.results.speed_document import load_speeds
from spike_export.serving.guidellm import report_of, run_guidellm
from spike_export.serving.load import Load, percentiles, run_load
from tests.support.documentation import json_keys
from tests.support.terminal_words import kept_words, too_wide
from tests.support.tiny.cli_models import call
from tests.support.tiny.service import Running


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


@pytest.mark.skipif(shutil.which("guidellm") is None, reason="guidellm is not installed")
def test_guidellm_sends_the_same_requests(server: Running) -> None:
    load = Load(requests=5, concurrency=2, prompt_words=4, new_tokens=6, spread=0.5)
    own, other = run_load(server.url, load), run_guidellm(server.url, load)
    for report in (own, other):
        assert [request.error for request in report.requests] == [None] * 5
    assert sorted((one.prompt_tokens, one.tokens) for one in own.requests) == sorted(
        (one.prompt_tokens, one.tokens) for one in other.requests
    )
    assert all(0 < request.first <= request.whole for request in other.requests)


def test_what_guidellm_reports_is_counted_as_the_own_figures_are() -> None:
    answered = {"time_to_first_token_ms": 250.0, "request_latency": 1.25, "prompt_tokens": 9, "output_tokens": 5}
    requests = {"successful": [answered], "errored": [{"info": {"error": "status 429"}}]}
    document = {"benchmarks": [{"start_time": 10.0, "end_time": 12.5, "requests": requests}]}
    figures = report_of(Load(requests=2), document).as_json()
    assert (figures["errors"], figures["first_error"]) == (1, "status 429")
    assert figures["tokens_per_second"] == 2
    assert (figures["time_to_first_token"]["p50"], figures["time_per_token"]["p50"]) == (0.25, 0.25)


def test_guidellm_that_is_missing_or_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineError, match="there is no program guidellm; install"):
        run_guidellm("http://127.0.0.1:9", Load())
    (tmp_path / "guidellm").write_text("#!/bin/sh\necho it fails >&2\n", encoding="utf-8")
    (tmp_path / "guidellm").chmod(0o755)
    with pytest.raises(EngineError, match=r"has not measured http://127\.0\.0\.1:9: it fails; install"):
        run_guidellm("http://127.0.0.1:9", Load())


def test_the_command_serves_a_bundle_meanwhile(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = kept_words(monkeypatch)
    small = ("--requests", "2", "--prompt-words", "3", "--new-tokens", "3", "--threads", "1", "--concurrency", "2")
    (figures,) = json.loads(call("bench", bundle, *small, "--json").out)
    assert (figures["concurrency"], figures["generated_tokens"]) == (2, 6)
    assert sorted(figures) == sorted(json_keys()["bench"])
    assert "per token, ms" in "".join(words)
    assert too_wide(words) == []
    (tmp_path / "speed.json").write_text(json.dumps([figures]), encoding="utf-8")
    assert load_speeds(tmp_path / "speed.json")[0].tokens_per_second == figures["tokens_per_second"]
    assert "there is no server" in call("bench", "http://127.0.0.1:9", *small).error
    with pytest.raises(EngineError, match="requests is 0"):
        Load(requests=0)
