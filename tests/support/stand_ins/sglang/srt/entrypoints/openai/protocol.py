"""Stands in for SGLang's classes of requests and answers, from which Ray Serve LLM makes its own.

The fields are those of OpenAI's API that Ray's ingress reads; what else a body has is kept.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow")


class _Request(_Open):
    model: str | None = None
    stream: bool | None = False


class ChatCompletionRequest(_Request):
    messages: list[dict[str, Any]]


class CompletionRequest(_Request):
    prompt: str | list[str] | list[int] | list[list[int]]


class TokenizeRequest(_Request):
    prompt: str


class DetokenizeRequest(_Request):
    tokens: list[int]


class _Answer(_Open):
    id: str
    object: str
    created: int
    model: str
    choices: list[dict[str, Any]]


class ChatCompletionResponse(_Answer):
    usage: dict[str, Any]


class CompletionResponse(_Answer):
    usage: dict[str, Any]


class ChatCompletionStreamResponse(_Answer):
    pass


class CompletionStreamResponse(_Answer):
    pass


class TokenizeResponse(_Open):
    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeResponse(_Open):
    text: str


class EmbeddingRequest(_Request):
    input: Any


class EmbeddingResponse(_Open):
    pass


class ScoringRequest(_Request):
    pass


class ScoringResponse(_Open):
    pass
