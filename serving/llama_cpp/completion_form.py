"""The body of `/completion`: llama.cpp's names for what OpenAI's completions are asked for."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from spike_export.serving.openai.form import MOST_PROMPTS, Form
from spike_export.serving.openai.sampling_form import SamplingForm

PromptText = Annotated[str, Field(json_schema_extra={"minLength": 1})]
Part = Annotated[int, Field(ge=0)] | Annotated[str, Field(min_length=1)]
Mixed = Annotated[list[Part], Field(min_length=1)]
"""A prompt in parts, each of them a token or a text."""


class PromptObject(Form):
    """A text in an envelope, which could hold pictures; there are none here."""

    prompt_string: Annotated[str, Field(min_length=1)]
    multimodal_data: Annotated[list[Any], Field(max_length=0)] | None = None


Prompt = PromptText | PromptObject | Mixed


class CompletionForm(SamplingForm):
    """The body of a request. What is absent is the bundle's default, as for OpenAI's endpoints.

    Attributes:
        prompt: A text, an envelope with a text, a prompt in parts, or several of these.
        n_predict: Most new tokens; -1, as well as more than there is room for, stands for all that there is room for.
        n_probs: As many of the most probable tokens are told for each token.
        post_sampling_probs: Tell probabilities behind temperature and filters in place of the model's.
        response_fields: The fields of the answer that are wanted, inner ones behind a slash; all when empty.
    """

    prompt: Prompt | Annotated[list[Prompt], Field(min_length=1), MOST_PROMPTS]
    n_predict: Annotated[int, Field(ge=-1, json_schema_extra={"not": {"const": 0}})] = -1
    n_probs: Annotated[int, Field(ge=0, le=20)] = 0
    post_sampling_probs: bool = False
    return_tokens: bool = False
    response_fields: list[str] = Field(default_factory=list)
    n: Literal[1] | None = None

    bars_ends: ClassVar[bool] = True

    @property
    def as_drawn(self) -> bool:
        """See `SamplingForm`."""
        return self.post_sampling_probs

    @property
    def prompts(self) -> list[str | list[int | str]]:
        """All prompts, each a text or a list of parts; a list that holds a token is one prompt."""
        if not isinstance(self.prompt, list):
            return [_plain(self.prompt)]
        parts: list[Any] = self.prompt
        return [parts] if any(isinstance(part, int) for part in parts) else [_plain(part) for part in parts]


def _plain(prompt: Prompt) -> str | list[int | str]:
    return prompt.prompt_string if isinstance(prompt, PromptObject) else prompt
