"""From a form to the sequences that the engine is to generate."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.errors import EngineError
from spike_export.engines.generation.options import require_vocabulary
from spike_export.engines.generation.prompt_tokens import Prompt
from spike_export.serving.grammars import Grammar
from spike_export.serving.openai.errors import RequestError, exceeded, refused
from spike_export.serving.openai.format_form import Source
from spike_export.serving.openai.sampling_form import SamplingForm, choices_of
from spike_export.serving.scheduling.batch import Work
from spike_export.serving.service import Service

_MOST_TEXTS = 256
"""Most texts that a logit bias may name."""


def require_model(service: Service, name: str | None) -> None:
    """Refuse another model than the one that is served; a request may leave the name out.

    Raises:
        RequestError: Names the model.
    """
    served = (service.settings.model, *service.settings.aliases)
    if name and name not in served:
        raise RequestError(
            f"the model {name!r} does not exist; this server has {', '.join(map(repr, served))}",
            404,
            param="model",
            code="model_not_found",
        )


async def encoded(
    service: Service, prompts: Prompt | Sequence[Prompt], param: str, tools: Sequence[Mapping[str, Any]] = ()
) -> list[NDArray[np.int64]]:
    """Return the tokens of prompts; tools are for the chat template.

    Raises:
        RequestError: A prompt cannot be used; names the field.
    """
    try:
        return await service.off_loop(lambda: service.model.prompts.encode(prompts, tools))
    except EngineError as error:
        raise refused(error, param) from error


async def plain_tokens(service: Service, text: str) -> list[int]:
    """Return the tokens of a text by itself, without the one that begins a text.

    Raises:
        RequestError: The text cannot be used.
    """
    (tokens,) = await encoded(service, [text], "content")
    begins = tokens[0] == service.model.manifest.bos_token_id
    plain: list[int] = tokens[int(begins) :].tolist()
    return plain


def new_tokens(service: Service, prompt_tokens: int, asked: int | None, default: int | None, param: str) -> int:
    """Return how many tokens an answer may have.

    Args:
        service: Whose limits hold.
        prompt_tokens: Length of the prompt.
        asked: What the request says.
        default: What holds where it says nothing; None for all that there is room for.
        param: Name of the field.

    Raises:
        RequestError: It is more than the server allows or the context has room for.
    """
    most, room = service.settings.max_new_tokens, service.limits.room(prompt_tokens)
    if asked is not None and most is not None and asked > most:
        raise RequestError(f"{param} is {asked}; this server gives at most {most}", param=param)
    wanted = asked if asked is not None else min(each for each in (default, most, max(room, 1)) if each is not None)
    try:
        service.limits.require_room(prompt_tokens, wanted)
    except EngineError as error:
        raise exceeded(error, param, prompt_tokens, service.limits.context) from error
    return wanted


async def works_of(
    service: Service,
    form: SamplingForm,
    prompts: Sequence[NDArray[np.int64]],
    sizes: Sequence[int],
    logprobs: int | None,
    grammar: Source | None = None,
    *,
    scored: bool = False,
) -> list[Work]:
    """Return the sequences of a request: all answers to the first prompt, then those to the next one.

    Args:
        service: Whose defaults hold.
        form: How to draw.
        prompts: Tokens of each prompt.
        sizes: Most new tokens behind each prompt.
        logprobs: See `GenerationOptions`.
        grammar: What the texts have to be like; what the form says when omitted.
        scored: See `Work`.

    Raises:
        RequestError: A value cannot be used, or there are more sequences than this server ever takes.
    """
    if len(prompts) * form.choices > service.places:
        raise RequestError(
            f"{len(prompts)} prompts with {form.choices} answers each are more sequences than this server takes "
            f"({service.places}); ask for fewer",
            param="n",
        )
    biases = await _biases(service, form)
    begin = await _grammar(service, grammar or form.grammar)
    works = []
    for prompt, size in zip(prompts, sizes, strict=True):
        options = form.options(service.model.defaults, size, logprobs, biases)
        try:
            require_vocabulary(options, service.model.manifest.vocab_size)
        except EngineError as error:
            raise refused(error, "logit_bias") from error
        for each in choices_of(options, form.choices):
            works.append(Work(prompt, each, None if begin is None else begin.copy(), scored))
    return works


async def _biases(service: Service, form: SamplingForm) -> dict[int, float]:
    """Return what is added to the logit of each token.

    Raises:
        RequestError: A text cannot be used, or there are too many: each is encoded by itself.
    """
    found: dict[int, float] = {}
    biases = form.biases
    if sum(isinstance(name, str) for name, _ in biases) > _MOST_TEXTS:
        raise RequestError(f"logit_bias names more than {_MOST_TEXTS} texts; give their tokens", param="logit_bias")
    for name, bias in biases:
        tokens = [name] if isinstance(name, int) else await plain_tokens(service, name)
        found |= dict.fromkeys(tokens, bias)
    if form.ignore_eos and form.bars_ends:
        found |= dict.fromkeys(service.model.defaults.eos_token_ids, -math.inf)
    return found


async def _grammar(service: Service, source: Source | None) -> Grammar | None:
    if source is None:
        return None
    try:
        return await service.off_loop(lambda: service.grammars.compile(*source))
    except EngineError as error:
        raise refused(error, "response_format") from error
