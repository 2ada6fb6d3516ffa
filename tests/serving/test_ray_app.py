"""The server as an application of Ray Serve, on a cluster of this machine."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from openai import OpenAI, OpenAIError
from pydantic import ValidationError

from spike_export import Engine
from spike_export.serving.ray_app import Arguments, Replica, build
from tests.support.tiny.service import CAPACITY, write_served_bundle

ROOT = Path(__file__).resolve().parents[2]

LONG = CAPACITY - 20
"""Tokens of an answer that takes a while."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_served_bundle(tmp_path_factory.mktemp("ray"))


def test_arguments_may_be_text_and_unknown_ones_are_refused(bundle: Path) -> None:
    found = Arguments.model_validate({"path": str(bundle), "rows": "3", "gpus": "0"})
    assert (found.settings().rows, found.settings().model) == (3, "bundle")
    assert found.choice().threads == 1
    with pytest.raises(ValidationError, match="row"):
        Arguments.model_validate({"path": str(bundle), "row": 3})
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        Arguments(path=bundle, rows=0)


def test_the_file_for_a_cluster_names_the_application_and_arguments_that_it_has() -> None:
    config = yaml.safe_load((ROOT / "deploy/ray-serve.yaml").read_text(encoding="utf-8"))
    (application,) = config["applications"]
    assert application["import_path"] == f"{build.__module__}:{build.__name__}"
    assert Arguments.model_validate(application["args"]).max_replicas == 8
    schema = pytest.importorskip("ray.serve.schema", reason="needs the extra `ray-serve`")
    schema.ServeDeploySchema.model_validate(config)


def test_a_replica_whose_engine_has_stopped_is_unhealthy(bundle: Path) -> None:
    replica = Replica(Arguments(path=bundle, rows=1, prefix_cache=0))
    try:
        replica.check_health()
        replica._service.worker.state = "stopped"
        with pytest.raises(RuntimeError, match="the engine has failed twice"):
            replica.check_health()
    finally:
        replica._service.close()


PATIENT = {
    "RAY_worker_niceness": "0",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "120",
}
"""Ray's processes let others go first (niceness 15); beside other work the proxy would be given up before it starts."""


@pytest.fixture(scope="module")
def url(bundle: Path) -> Iterator[str]:
    pytest.importorskip("ray", reason="needs the extra `ray-serve`")
    pytest.importorskip("mmh3", reason="needs the extra `ray-serve`")
    os.environ.update(PATIENT, RAY_USAGE_STATS_ENABLED="0")
    import ray
    from ray import serve
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    serve.start(http_options={"host": "127.0.0.1", "port": 8137})
    # As `serve run spike_export.serving.ray_app:build path=... rows=2 ...` does it.
    given = {"path": str(bundle), "model": "tiny", "rows": "2", "min_replicas": "2"}
    serve.run(call_user_app_builder_with_args_if_necessary(build, given), name="tiny", route_prefix="/")
    yield "http://127.0.0.1:8137"
    serve.shutdown()
    ray.shutdown()


@pytest.mark.slow
def test_two_replicas_answer_as_one_server(url: str, bundle: Path) -> None:
    with Engine.open(bundle) as engine:
        expected = engine.generate("ab cd", max_new_tokens=12, do_sample=False)[0].text
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
    asked: dict[str, Any] = {"model": "tiny", "prompt": "ab cd", "max_tokens": 12, "temperature": 0}
    for session in range(4):
        headers = {"x-session-id": str(session)}
        found = client.completions.create(**asked, extra_headers=headers)
        assert found.choices[0].text == expected
        stream = client.completions.create(**asked, stream=True, extra_headers=headers)
        assert "".join(event.choices[0].text for event in stream if event.choices) == expected
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert httpx2.get(f"{url}/ready", timeout=30).status_code == 200


@pytest.mark.slow
def test_a_session_finds_its_beginning_in_one_replica(url: str) -> None:
    """Eight requests of one session, and of none: the first is read once, the others by chance in either replica."""
    prompt = "one beginning of many requests, " * 3

    def cached(headers: dict[str, str]) -> int:
        body = {"model": "tiny", "prompt": prompt + headers["x-session-id"], "max_tokens": 1}
        answer = httpx2.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60).json()
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    first, *others = [cached({"x-session-id": "a"}) for _ in range(6)]
    assert min(others) >= 32
    assert first <= min(others)


def kill_a_replica() -> None:
    import ray

    names = [each["name"] for each in ray.util.list_named_actors(all_namespaces=True)]
    (victim, *_) = [name for name in names if "spike-export" in name]
    ray.kill(ray.get_actor(victim, namespace="serve"), no_restart=True)


def replicas_that_run() -> int:
    from ray import serve

    (deployment,) = serve.status().applications["tiny"].deployments.values()
    return deployment.replica_states.get("RUNNING", 0)


@dataclass
class Outcomes:
    """What clients got: whole answers, whole streams, and streams that ended with an error."""

    answers: int = 0
    streams: int = 0
    told: list[str] = field(default_factory=list)


def ask_on(url: str, session: int, expected: str, until: threading.Event, found: Outcomes) -> None:
    """Ask for one answer after another, half of them streamed; a request that failed is sent again by the client."""
    headers = {"x-session-id": str(session)}
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=8, timeout=60, default_headers=headers)
    asked: dict[str, Any] = {"model": "tiny", "prompt": "ab cd", "max_tokens": LONG, "temperature": 0}
    asked["extra_body"] = {"ignore_eos": True}
    while not until.is_set():
        assert client.completions.create(**asked).choices[0].text == expected
        found.answers += 1
        text, reason = "", None
        try:
            for event in client.completions.create(**asked, stream=True):
                text += event.choices[0].text
                reason = event.choices[0].finish_reason or reason
        except (OpenAIError, httpx2.HTTPError) as error:
            found.told.append(str(error))
        else:
            assert (text, reason) == (expected, "length"), "a stream was cut short, and nobody was told"
            found.streams += 1


@pytest.mark.slow
def test_a_replica_killed_under_load_loses_no_request_that_can_be_sent_again(url: str, bundle: Path) -> None:
    """An answer in one piece is asked for again; the reader of a stream that had begun is told that it broke."""
    with Engine.open(bundle) as engine:
        expected = engine.generate("ab cd", max_new_tokens=LONG, do_sample=False, ignore_eos=True)[0].text
    until, found = threading.Event(), [Outcomes() for _ in range(6)]
    with ThreadPoolExecutor(6) as clients:
        running = [clients.submit(ask_on, url, session, expected, until, each) for session, each in enumerate(found)]
        try:
            wait_for(lambda: all(each.streams for each in found))
            kill_a_replica()
            before = [each.answers for each in found]
            wait_for(lambda: all(each.answers > count + 1 for each, count in zip(found, before, strict=True)))
            wait_for(lambda: replicas_that_run() == 2)
        finally:
            until.set()
        for each in running:
            each.result()
    assert any(each.told for each in found)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.slow
def test_the_others_answer_while_a_replica_is_replaced(url: str) -> None:
    kill_a_replica()
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=5, timeout=60)
    for number in range(6):
        headers = {"x-session-id": str(number)}
        found = client.completions.create(model="tiny", prompt="ab cd", max_tokens=4, extra_headers=headers)
        assert found.choices[0].finish_reason == "length"
