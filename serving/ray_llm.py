"""The server as a `server_cls` of `ray.serve.llm`, whose OpenAI ingress then answers for it.

`ray.serve.llm` imports vLLM's or SGLang's classes of requests and answers, and needs one of the two installed. Where
neither is, `spike_export.serving.ray_app` serves the same without them.
"""

import json
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

from spike_export.artifacts.errors import EngineError
from spike_export.serving.app import create_app
from spike_export.serving.in_process import posted
from spike_export.serving.ray_app import Arguments, Replica, deployment_options

Answers = Callable[["Server", Any, Any], AsyncGenerator[Any, None]]


def _endpoint(path: str, kind: str) -> Answers:
    """Return a method of Ray's protocol that asks the application.

    It yields one answer of Ray's class `kind`, or the events of a stream as text, or one `ErrorResponse`.
    """

    async def answers(server: "Server", request: Any, raw_request_info: Any = None) -> AsyncGenerator[Any, None]:
        from ray.llm._internal.serve.core.configs import openai_api_models as models

        body = request.model_dump_json(exclude_unset=True).encode()
        headers: Mapping[str, str] = {} if raw_request_info is None else raw_request_info.headers
        async with posted(server.app, path, body, headers) as answered:
            if answered.status >= 400:
                yield _error(models, answered.status, await answered.body())
            elif getattr(request, "stream", False):
                async with aclosing(answered.pieces) as pieces:
                    async for piece in pieces:
                        if piece:
                            yield piece.decode()
            else:
                answer = json.loads(await answered.body())
                if "prompt" in answer:
                    answer["text"] = answer["prompt"]  # SGLang's name of the text of tokens
                yield getattr(models, kind).model_validate(answer)

    return answers


class Server(Replica):
    """A bundle or a plan behind Ray's ingress: `LLMConfig(server_cls="spike_export.serving.ray_llm:Server", ...)`.

    The config's `model_source` is the path, `engine_kwargs` are the other fields of `Arguments`. Methods are those of
    Ray's `LLMServerProtocol` for what the server can do: texts, chats and tokens.

    Attributes:
        app: The application that answers.
    """

    chat = _endpoint("/v1/chat/completions", "ChatCompletionResponse")
    completions = _endpoint("/v1/completions", "CompletionResponse")
    tokenize = _endpoint("/tokenize", "TokenizeResponse")
    detokenize = _endpoint("/detokenize", "DetokenizeResponse")

    def __init__(self, llm_config: Any) -> None:
        super().__init__(arguments_of(llm_config))
        self._llm_config = llm_config
        self.app = create_app(self._service)

    async def start(self) -> None:
        """Do nothing: the engine is open."""

    async def llm_config(self) -> Any:
        """Return what the server was made of."""
        return self._llm_config

    @classmethod
    def get_deployment_options(cls, llm_config: Any) -> dict[str, Any]:
        """Return options for Ray Serve: those of the config's `deployment_config` over this server's own."""
        given = dict(llm_config.deployment_config)
        own = deployment_options(arguments_of(llm_config))
        if "num_replicas" in given:
            del own["autoscaling_config"]
        joined = {name: own[name] | value for name, value in given.items() if _both_are_dicts(own.get(name), value)}
        return own | given | joined


def arguments_of(llm_config: Any) -> Arguments:
    """Return the arguments in an `LLMConfig`.

    Raises:
        EngineError: `model_source` is no path.
    """
    loading = llm_config.model_loading_config
    if not isinstance(loading.model_source, str):
        raise EngineError(
            f"{loading.model_id}: model_loading_config.model_source is {loading.model_source!r}; give the path of a "
            "bundle or a plan that all machines see"
        )
    named = {"path": Path(loading.model_source), "model": loading.model_id}
    return Arguments.model_validate({**llm_config.engine_kwargs, **named})


def _both_are_dicts(first: Any, second: Any) -> bool:
    return isinstance(first, dict) and isinstance(second, dict)


def _error(models: Any, status: int, body: bytes) -> Any:
    error = json.loads(body)["error"]
    told = models.ErrorInfo(message=error["message"], type=error["type"], param=error.get("param"), code=status)
    return models.ErrorResponse(error=told)
