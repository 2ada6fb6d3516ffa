"""The part of a request that says how to draw tokens and where to end."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar

from pydantic import AliasChoices, Field

from spike_export.artifacts.errors import EngineError
from spike_export.engines.generation.options import LOWEST_TEMPERATURE, GenerationOptions
from spike_export.serving.openai.errors import RequestError, refused
from spike_export.serving.openai.form import Form
from spike_export.serving.openai.format_form import MOST_GRAMMAR, ResponseFormat, Source, StructuredOutputs

MOST_CHOICES = 16
"""Most answers to one prompt: each takes a row."""

_LOWEST_TOP_P = 1e-6
"""Stands for a top p of 0, which OpenAI allows: the most probable token alone."""

_ANY_SEED = (None, -1)
"""Another seed each time; vLLM and llama.cpp write -1."""

StopText = Annotated[str, Field(min_length=1, max_length=1000)]
BiasedText = Annotated[str, Field(min_length=1, max_length=1000)]
"""A token's number as a key of JSON; or, as llama.cpp has it, a text, all of whose tokens are meant."""

Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
BiasedPair = Annotated[tuple[Annotated[int, Field(ge=0)] | BiasedText, Bias], Field(strict=False)]
"""llama.cpp's pair of a token, or a text, and a bias; JSON has lists for tuples."""

_TOKEN = re.compile(r"[0-9]{1,9}")


class StreamOptions(Form):
    """OpenAI's `stream_options`."""

    include_usage: bool = False


class SamplingForm(Form):
    """Fields that every endpoint which generates has. What is absent is the bundle's default.

    A temperature of 0 takes the most probable token; any other one, and top p, top k, min p or a seed, draw.

    Attributes:
        bars_ends: Whether `ignore_eos` bars tokens that end a sequence, as llama.cpp does, or generation goes on behind
            them, as OpenAI's clients of vLLM know it.
    """

    bars_ends: ClassVar[bool] = False

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[
        Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | None,
        Field(validation_alias=AliasChoices("repetition_penalty", "repeat_penalty")),  # vLLM's name, llama.cpp's name
    ] = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    logit_bias: dict[BiasedText, Bias] | list[BiasedPair] | None = None
    seed: int | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=128)] | None = None
    ignore_eos: bool = False
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    json_schema: dict[str, Any] | None = None
    grammar_text: Annotated[Annotated[str, Field(max_length=MOST_GRAMMAR)] | None, Field(alias="grammar")] = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    timings_per_token: bool = False
    return_progress: bool = False
    user: str | None = None

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def as_drawn(self) -> bool:
        """Whether log-probabilities are those behind temperature and filters."""
        return False

    @property
    def biases(self) -> list[tuple[int | str, float]]:
        """What is added to the logits of a token, or of the tokens of a text."""
        if isinstance(self.logit_bias, dict):
            return [(int(name) if _TOKEN.fullmatch(name) else name, bias) for name, bias in self.logit_bias.items()]
        return list(self.logit_bias or ())

    @property
    def grammar(self) -> Source | None:
        """What the text has to be like; None for any text.

        Raises:
            RequestError: Two fields say so, or the end of the text is to be ignored.
        """
        said: list[Source | None] = [
            None if self.response_format is None else self.response_format.source,
            None if self.structured_outputs is None else self.structured_outputs.source,
            None if self.json_schema is None else ("json_schema", self.json_schema),
            None if not self.grammar_text else ("gbnf", self.grammar_text),
        ]
        sources = [each for each in said if each is not None]
        if len(sources) > 1:
            raise RequestError(
                "give one of response_format, structured_outputs, json_schema, grammar", param="structured_outputs"
            )
        source = sources[0] if sources else None
        if source is not None and self.ignore_eos:
            raise RequestError("a text of a form ends where the form ends; leave ignore_eos out", param="ignore_eos")
        return source

    @property
    def usage_in_stream(self) -> bool:
        """Whether a stream ends with a chunk of token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def options(
        self,
        defaults: GenerationOptions,
        new_tokens: int,
        logprobs: int | None,
        biases: Mapping[int, float],
    ) -> GenerationOptions:
        """Return how to generate.

        Args:
            defaults: The bundle's.
            new_tokens: Most of them.
            logprobs: See `GenerationOptions`.
            biases: Token → what is added to its logit.

        Raises:
            RequestError: A value cannot be used.
        """
        changes: dict[str, Any] = {
            "max_new_tokens": new_tokens,
            "logprobs": logprobs,
            "ignore_eos": self.ignore_eos,
            "stop_strings": tuple([self.stop] if isinstance(self.stop, str) else self.stop or ()),
            "eos_token_ids": (*defaults.eos_token_ids, *(self.stop_token_ids or ())),
            "seed": None if self.seed in _ANY_SEED else self.seed % 2**62,
            "top_p": None if self.top_p is None else max(self.top_p, _LOWEST_TOP_P),
            "top_k": None if self.top_k is None else max(self.top_k, 0),  # vLLM writes -1 for all
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": tuple(biases.items()),
            "logprobs_as_drawn": self.as_drawn,
            **self._drawing(),
        }
        optional = {"logprobs", "seed"}
        given = {name: value for name, value in changes.items() if value is not None or name in optional}
        try:
            return replace(defaults, **given)
        except EngineError as error:
            raise refused(error) from error

    def _drawing(self) -> dict[str, Any]:
        if self.temperature is not None:
            draws = self.temperature > 0
            return {"do_sample": draws} | ({"temperature": max(self.temperature, LOWEST_TEMPERATURE)} if draws else {})
        asked = (self.top_p, self.top_k, self.min_p, self.seed)
        return {"do_sample": True} if any(value is not None for value in asked) else {}


def choices_of(options: GenerationOptions, count: int) -> Sequence[GenerationOptions]:
    """Return the options of each answer to one prompt: answer i draws with seed + i."""
    if options.seed is None:
        return [options] * count
    return [replace(options, seed=(options.seed + number) % 2**62) for number in range(count)]
