"""The application: which path is answered by what, and in which shape errors leave."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, PlainTextResponse, Response

from spike_export.serving.llama_cpp.completion import Completion
from spike_export.serving.llama_cpp.state import ServerState
from spike_export.serving.llama_cpp.template import Template
from spike_export.serving.middleware import AnyOrigin, BodyLimit, KeyCheck, RequestRecord
from spike_export.serving.openai.chat import ChatCompletions
from spike_export.serving.openai.completions import Completions
from spike_export.serving.openai.errors import RequestError
from spike_export.serving.openai.exchange import JsonAnswer
from spike_export.serving.openai.inference_protocol import InferenceProtocol
from spike_export.serving.openai.responses import Responses
from spike_export.serving.openai.state import State
from spike_export.serving.openai.tokens import Tokens
from spike_export.serving.service import Service

_STREAMED = frozenset(
    {
        *("/v1/chat/completions", "/v1/completions", "/v1/responses"),
        *("/chat/completions", "/completions", "/responses", "/completion"),
    }
)
_CLASSES: dict[str, type[Response]] = {"/": HTMLResponse, "/metrics": PlainTextResponse}
_STREAMING: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
_REFUSALS: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "Refused, in OpenAI's shape"},
    "5XX": {"description": "The engine does not compute now, or took too long"},
}


def create_app(service: Service) -> FastAPI:
    """Return the application over a service, which it closes when it shuts down."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title="spike-export", version=version("spike-export"), lifespan=lifespan, docs_url=None, redoc_url=None
    )
    _add_routes(app, service)
    _add_middleware(app, service)
    app.add_exception_handler(RequestError, _request_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _fault)
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    tokens, template, state, server_state = Tokens(service), Template(service), State(service), ServerState(service)
    chat, completion, responses = ChatCompletions(service), Completion(service), Responses(service)
    protocol = InferenceProtocol(service)
    posts: dict[str, Callable[..., Any]] = {
        "/v1/chat/completions": chat.create,
        "/chat/completions": chat.create,
        "/v1/completions": Completions(service).create,
        "/completion": completion.create,
        "/completions": completion.create,  # llama.cpp's, not OpenAI's
        "/v1/responses": responses.create,
        "/responses": responses.create,
        "/tokenize": tokens.tokenize,
        "/detokenize": tokens.detokenize,
        "/apply-template": template.apply,
    }
    gets: dict[str, Callable[..., Any]] = {
        "/v1/models": state.models,
        "/models": state.models,
        "/props": server_state.props,
        "/slots": server_state.slots,
        "/v1/models/{name:path}": state.model,
        "/health": state.live,
        "/v1/health": state.live,
        "/v1/health/live": state.live,
        "/ready": state.ready,
        "/v1/health/ready": state.ready,
        "/v2": protocol.server,
        "/v2/health/live": protocol.live,
        "/v2/health/ready": protocol.ready,
        "/v2/models/{name}": protocol.model,
        "/v2/models/{name}/ready": protocol.model_ready,
        "/v2/models/{name}/versions/1": protocol.model,
        "/v2/models/{name}/versions/1/ready": protocol.model_ready,
        "/metrics": state.metrics,
        "/model-card": state.card,
        "/": state.page,
    }
    for method, routes in (("POST", posts), ("GET", gets)):
        for path, endpoint in routes.items():
            app.add_api_route(
                path,
                endpoint,
                methods=[method],
                response_model=None,
                response_class=_CLASSES.get(path, JsonAnswer),
                responses=_STREAMING | _REFUSALS if path in _STREAMED else _REFUSALS,
            )


def _add_middleware(app: FastAPI, service: Service) -> None:
    """Add the layers, innermost first."""
    settings = service.settings
    app.add_middleware(BodyLimit, most=settings.max_body)
    if settings.api_keys:
        app.add_middleware(KeyCheck, keys=settings.api_keys)
    if "*" in settings.allowed_origins:
        app.add_middleware(AnyOrigin)
    elif settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allowed_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
        )
    app.add_middleware(RequestRecord, log=service.log)


async def _request_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError), "registered for these alone"
    return JsonAnswer(error.body, error.status, dict(error.headers))


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError), "registered for these alone"
    fault = max(error.errors(), key=_depth)
    place = ".".join(str(part) for part in fault["loc"] if _is_place(part))
    text = str(fault["msg"]).removeprefix("Value error, ")  # what pydantic puts in front of a check's own words
    message = f"{place}: {text}" if place else text
    return JsonAnswer(RequestError(message, param=place or None).body, 400)


def _depth(fault: Mapping[str, Any]) -> tuple[int, bool]:
    """Return how much a fault says: of several forms that a value may have, the one that came furthest was meant."""
    return len(fault["loc"]), not fault["type"].endswith("_type")


def _is_place(part: int | str) -> bool:
    """Return whether a part of a fault's place is the client's: pydantic also names the form that it tried."""
    return isinstance(part, int) or not ("[" in part or part in ("body", "str", "int", "float", "bool"))


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "registered for these alone"
    kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
    body = RequestError(str(error.detail), error.status_code, kind).body
    return JsonAnswer(body, error.status_code, dict(error.headers or {}))


async def _fault(_: Request, __: Exception) -> Response:
    """Answer for a fault of this program, which the server's log has in full."""
    return JsonAnswer(RequestError("the server has a fault; its log says more", 500, "server_error").body, 500)
