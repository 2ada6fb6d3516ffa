"""A request of Triton's, read from its tensors and parameters."""

import json
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from pydantic import AliasChoices, ConfigDict, Field, ValidationError, field_validator

from spike_export.serving.openai.errors import RequestError
from spike_export.serving.openai.format_form import StructuredOutputs
from spike_export.serving.openai.sampling_form import SamplingForm
from spike_export.serving.triton.tensors import ADDED, PARAMETERS, STREAM, TEXT, WITHOUT_PROMPT

DEFAULT_TOKENS = 16
"""vLLM's `max_tokens` where a request says nothing."""


class TritonForm(SamplingForm):
    """The sampling parameters. Triton's own parameters have no floating-point numbers, so that text may stand for one.

    Attributes:
        logprobs: How many of the most probable tokens are told; `true` where `top_logprobs` says how many (a chat of
            Triton's OpenAI frontend).
        structured_outputs: As an object, or as Triton's OpenAI frontend writes it for the arguments of a tool; earlier
            ones name it `guided_decoding`.
        min_tokens: None: there is no least number of tokens.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(strict=False, extra="ignore", populate_by_name=True)

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | Annotated[int, Field(ge=0, le=20)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    structured_outputs: Annotated[
        StructuredOutputs | None, Field(validation_alias=AliasChoices("structured_outputs", "guided_decoding"))
    ] = None
    min_tokens: Annotated[int, Field(ge=0, le=0)] | None = None

    @field_validator("structured_outputs", mode="before")
    @classmethod
    def _without_what_is_not_said(cls, value: Any) -> Any:
        """Read the fields of vLLM's parameters from JSON text, in which a schema is JSON text again."""
        if not isinstance(value, str):
            return value
        given = json.loads(value)
        if not isinstance(given, dict):
            raise ValueError("expected a JSON object")
        fields = {name: each for name, each in given.items() if each is not None and each is not False}
        if isinstance(fields.get("json"), str):
            fields["json"] = json.loads(fields["json"])
        return fields

    @property
    def top(self) -> int | None:
        """How many of the most probable tokens are told; None for no log-probabilities."""
        if self.logprobs is None or self.logprobs is False:
            return None
        return self.top_logprobs or 0 if self.logprobs is True else self.logprobs


@dataclass(frozen=True)
class TritonRequest:
    """What is asked for.

    Attributes:
        text: The prompt.
        streams: Whether each piece of the answer is a response of its own.
        repeats_prompt: Whether the prompt stands in front of the answer.
        added: Outputs besides the text.
    """

    text: str
    streams: bool
    repeats_prompt: bool
    added: frozenset[str]
    form: TritonForm

    @classmethod
    def read(cls, request: Any, triton: Any) -> Self:
        """Read a request.

        Args:
            request: Triton's `InferenceRequest`.
            triton: The module `triton_python_backend_utils`.

        Raises:
            RequestError: A tensor or a parameter cannot be used.
        """

        def value(name: str) -> Any:
            tensor = triton.get_input_tensor_by_name(request, name)
            return None if tensor is None else tensor.as_numpy().reshape(-1)[0]

        streams = bool(value(STREAM))
        excluded = value(WITHOUT_PROMPT)
        repeats = not streams if excluded is None else not excluded
        if repeats and streams:
            raise RequestError(f"a stream does not repeat the prompt; give {WITHOUT_PROMPT} true", param=WITHOUT_PROMPT)
        given = value(PARAMETERS)
        form = _form(request.parameters() if given is None else _text(given, PARAMETERS))
        added = frozenset(output for name, output in ADDED.items() if value(name))
        if "logprobs" not in added and form.top is not None:
            added |= {"logprobs"}
        return cls(_text(value(TEXT), TEXT), streams, repeats, added, form)

    @property
    def logprobs(self) -> int | None:
        """How many of the most probable tokens the engine tells; None for no log-probabilities."""
        if self.form.top is not None:
            return self.form.top
        return 0 if self.added & {"logprobs", "cumulative_logprob"} else None


def _text(value: Any, name: str) -> str:
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise RequestError(f"{name} is no UTF-8 text", param=name) from error


def _form(text: str) -> TritonForm:
    try:
        return TritonForm.model_validate(json.loads(text or "{}"))
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(str(part) for part in fault["loc"])
        raise RequestError(f"{place}: {fault['msg']}", param=place) from error
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{PARAMETERS} is no JSON object", param=PARAMETERS) from error
