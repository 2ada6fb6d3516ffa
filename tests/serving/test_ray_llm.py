"""The server as a `server_cls` of `ray.serve.llm`, whose classes of requests a stand-in of SGLang's are."""

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spike_export import Engine
from spike_export.artifacts.errors import EngineError
from spike_export.serving.ray_llm import Server, arguments_of
from tests.support.tiny.service import write_served_bundle

STAND_INS = Path(__file__).resolve().parents[1] / "support/stand_ins"

CLASS = f"{Server.__module__}:{Server.__name__}"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_served_bundle(tmp_path_factory.mktemp("ray"))


def config_of(source: Any, **changes: Any) -> Any:
    loading = SimpleNamespace(model_id="tiny", model_source=source)
    fields: dict[str, Any] = {"model_loading_config": loading, "engine_kwargs": {}, "deployment_config": {}}
    return SimpleNamespace(**fields | changes)


def test_a_config_names_path_and_arguments(bundle: Path) -> None:
    found = arguments_of(config_of(str(bundle), engine_kwargs={"rows": 3}))
    assert (found.path, found.model, found.rows) == (bundle, "tiny", 3)
    with pytest.raises(EngineError, match=r"tiny: model_loading_config.model_source is None; give the path"):
        arguments_of(config_of(None))


def test_a_deployments_own_options_hold(bundle: Path) -> None:
    pytest.importorskip("ray.serve.config", reason="needs the extra `ray-serve`")
    given = {"ray_actor_options": {"num_cpus": 2}, "num_replicas": 2, "max_ongoing_requests": 9}
    found = Server.get_deployment_options(config_of(str(bundle), deployment_config=given))
    assert (found["num_replicas"], found["max_ongoing_requests"]) == (2, 9)
    assert found["ray_actor_options"] == {
        "num_cpus": 2,
        "num_gpus": 0,
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}},
    }
    assert "autoscaling_config" not in found
    assert "autoscaling_config" in Server.get_deployment_options(config_of(str(bundle)))


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray.serve.config", reason="needs the extra `ray-serve`")
    monkeypatch.syspath_prepend(STAND_INS)


@pytest.mark.usefixtures("stand_ins")
def test_the_server_has_what_the_protocol_asks_for() -> None:
    protocol = pytest.importorskip("ray.llm._internal.serve.core.protocol").LLMServerProtocol
    asked = {name for name in vars(protocol) if not name.startswith("_")}
    # Ray's ingress calls these on demand only: there is nothing to put to sleep, to pause or to profile.
    without = {"reset_prefix_cache", "start_profile", "stop_profile", "sleep", "wakeup", "is_sleeping"}
    without |= {"pause", "resume", "is_paused"}
    assert without < asked
    for name in asked - without:
        assert callable(getattr(Server, name)), name


@pytest.mark.usefixtures("stand_ins")
def test_answers_are_of_rays_classes(bundle: Path) -> None:
    from ray.llm._internal.serve.core.configs import openai_api_models as models

    server = Server(config_of(str(bundle), engine_kwargs={"rows": 1, "prefix_cache": 0}))

    async def one(answers: Any) -> Any:
        (found,) = [each async for each in answers]
        return found

    async def ask() -> None:
        text = await one(server.completions(models.CompletionRequest(model="tiny", prompt="ab", max_tokens=3)))
        assert isinstance(text, models.CompletionResponse)
        messages = [{"role": "user", "content": "ab"}]
        chat = await one(server.chat(models.ChatCompletionRequest(model="tiny", messages=messages, max_tokens=3)))
        assert isinstance(chat, models.ChatCompletionResponse)
        wrong = await one(server.completions(models.CompletionRequest(model="tiny", prompt="ab", temperature=9)))
        assert isinstance(wrong, models.ErrorResponse)
        assert wrong.error.code == 400
        assert "temperature" in wrong.error.message
        tokens = await one(server.tokenize(models.TokenizeCompletionRequest(model="tiny", prompt="ab")))
        back = await one(server.detokenize(models.DetokenizeRequest(model="tiny", tokens=tokens.tokens)))
        assert "ab" in back.text

    try:
        asyncio.run(ask())
        server.check_health()
    finally:
        server._service.close()


@pytest.fixture
def handle(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The server as a deployment that Ray Serve LLM builds, on a cluster of this machine."""
    for name in ("mmh3", "httpx", "python_multipart"):
        pytest.importorskip(name, reason=f"ray.serve.llm imports {name}, which vLLM brings with it")
    for name, value in {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}.items():
        monkeypatch.setenv(name, value)
    for name in ("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S"):
        monkeypatch.setenv(name, "120")
    import ray
    from ray import serve
    from ray.serve.llm import LLMConfig, build_llm_deployment

    path = os.pathsep.join(filter(None, (str(STAND_INS), os.environ.get("PYTHONPATH"))))
    quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    ray.init(address="local", num_cpus=3, runtime_env={"env_vars": {"PYTHONPATH": path}}, **quiet)
    config = LLMConfig(
        model_loading_config={"model_id": "tiny", "model_source": str(bundle)},
        engine_kwargs={"rows": 2},
        server_cls=CLASS,
        deployment_config={"num_replicas": 1},
    )
    deployment = build_llm_deployment(config, deployment_cls=config.server_cls)
    yield serve.run(deployment, name="tiny", route_prefix=None).options(stream=True)
    serve.shutdown()
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("stand_ins")
def test_a_deployment_of_ray_serve_llm_answers(handle: Any, bundle: Path) -> None:
    from ray.serve.llm.openai_api_models import CompletionRequest

    with Engine.open(bundle) as engine:
        expected = engine.generate("ab cd", max_new_tokens=12, do_sample=False)[0].text
    asked: dict[str, Any] = {"model": "tiny", "prompt": "ab cd", "max_tokens": 12, "temperature": 0}
    (whole,) = handle.completions.remote(CompletionRequest(**asked))
    assert whole.choices[0]["text"] == expected
    events = "".join(handle.completions.remote(CompletionRequest(**asked, stream=True))).splitlines()
    pieces = [json.loads(line.removeprefix("data: ")) for line in events if line and not line.endswith("[DONE]")]
    assert len(pieces) > 3
    assert "".join(choice["text"] for piece in pieces for choice in piece["choices"]) == expected
    (wrong,) = handle.completions.remote(CompletionRequest(**asked | {"temperature": 9}))
    assert wrong.error.code == 400
