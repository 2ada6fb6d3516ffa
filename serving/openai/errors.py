"""Errors in OpenAI's shape."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from spike_export.artifacts.errors import EngineError
from spike_export.serving.scheduling.worker import QueueFullError, UnavailableError

RETRY_SECONDS = 1
"""What a refused client is told to wait: about as long as a few tokens of the sequences in progress take."""


@dataclass
class RequestError(Exception):
    """A request that is not answered with a result.

    Attributes:
        kind: OpenAI's `type`.
        param: Field of the request that is at fault.
        code: OpenAI's `code`.
        figures: Further fields, for programs.
    """

    message: str
    status: int = 400
    kind: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, int] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """What the client reads."""
        fields = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": {**fields, **self.figures}}


def refused(error: EngineError, param: str | None = None) -> RequestError:
    """Return a request that cannot be used as an error of the client."""
    return RequestError(str(error), param=param)


def exceeded(error: EngineError, param: str, prompt_tokens: int, context: int) -> RequestError:
    """Return the error of a request that does not fit: OpenAI's code, llama.cpp's type and figures."""
    figures = {"n_prompt_tokens": prompt_tokens, "n_ctx": context}
    kind, code = "exceed_context_size_error", "context_length_exceeded"
    return RequestError(str(error), kind=kind, param=param, code=code, figures=figures)


def failed(error: EngineError) -> RequestError:
    """Return the error of a request that the engine did not take or could not finish."""
    if isinstance(error, QueueFullError):
        headers = {"Retry-After": str(RETRY_SECONDS)}
        return RequestError(f"{error}; try again", 429, "rate_limit_error", None, "queue_full", headers)
    if isinstance(error, UnavailableError):
        headers = {"Retry-After": str(RETRY_SECONDS)}
        return RequestError(f"{error}; try again", 503, "service_unavailable_error", None, "engine_failed", headers)
    return RequestError(str(error), 500, "server_error", None, "engine_error")


def timed_out(seconds: float) -> RequestError:
    """Return the error of an answer that took too long."""
    return RequestError(f"the answer was not complete after {seconds:g} s", 504, "timeout_error", None, "timeout")
