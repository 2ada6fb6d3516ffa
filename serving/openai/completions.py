"""`/v1/completions`: text that follows a text."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import Request
from pydantic import Field
from starlette.responses import Response

from spike_export.engines.generation.generated_text import Generation, Piece, TokenLogprob
from spike_export.serving.openai.exchange import Identity, answered, counts, followed, told_progress
from spike_export.serving.openai.form import MOST_PROMPTS
from spike_export.serving.openai.json_text import DONE, event_bytes
from spike_export.serving.openai.logprobs import CompletionLogprobs
from spike_export.serving.openai.requests import encoded, new_tokens, require_model, works_of
from spike_export.serving.openai.sampling_form import SamplingForm
from spike_export.serving.scheduling.answer import Answer, Progress
from spike_export.serving.scheduling.batch import Work
from spike_export.serving.service import Service

_DEFAULT_TOKENS = 16
"""OpenAI's `max_tokens` where a request says nothing."""

PromptText = Annotated[str, Field(json_schema_extra={"minLength": 1})]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionForm(SamplingForm):
    """The body of a request."""

    prompt: (
        PromptText
        | TokenIds
        | Annotated[list[PromptText], Field(min_length=1), MOST_PROMPTS]
        | Annotated[list[TokenIds], Field(min_length=1), MOST_PROMPTS]
    )
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    suffix: Literal[""] | None = None
    best_of: Literal[1] | None = None

    @property
    def prompts(self) -> list[Any]:
        """All prompts, one by one."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class Completions:
    """The endpoint."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, form: CompletionForm, request: Request) -> Response:
        """Answer one or several prompts, in one piece or as a stream."""
        require_model(self._service, form.model)
        prompts = await encoded(self._service, form.prompts, "prompt")
        asked = None if form.max_tokens is None else max(form.max_tokens, 1)
        sizes = [new_tokens(self._service, len(prompt), asked, _DEFAULT_TOKENS, "max_tokens") for prompt in prompts]
        scored = form.echo and form.logprobs is not None
        works = await works_of(self._service, form, prompts, sizes, form.logprobs, scored=scored)
        echoes = [self._echo(form, prompt) for prompt in form.prompts for _ in range(form.choices)]
        identity = Identity("text_completion", self._service, "cmpl")

        def whole(found: Sequence[Generation], answer: Answer) -> dict[str, Any]:
            kept = [_nothing(each) for each in found] if form.max_tokens == 0 else found
            choices = [
                _choice(
                    number,
                    echo + each.text,
                    each.finish_reason,
                    self._spelled(form, works[number], answer, number, each),
                )
                for number, (each, echo) in enumerate(zip(kept, echoes, strict=True))
            ]
            generated = sum(len(each.token_ids) for each in kept)
            return identity.head() | {"choices": choices} | counts(works, generated, answer, form)

        def events(answer: Answer) -> AsyncIterator[bytes]:
            return self._events(form, identity, answer, works, echoes)

        return await answered(self._service, request, works, whole, events if form.stream else None)

    def _echo(self, form: CompletionForm, prompt: Any) -> str:
        if not form.echo:
            return ""
        return prompt if isinstance(prompt, str) else str(self._service.model.tokenizer.decode(prompt))

    def _spelled(
        self, form: CompletionForm, work: Work, answer: Answer, number: int, found: Generation
    ) -> dict[str, Any] | None:
        if form.logprobs is None:
            return None
        scores = [*_scores(work, answer.scored[number]), *(found.logprobs or ())]
        return self._logprobs().spell(scores, [*_scored_tokens(work), *found.token_ids])

    def _logprobs(self) -> CompletionLogprobs:
        return CompletionLogprobs(self._service.model.tokenizer.backend_tokenizer)

    async def _events(
        self, form: CompletionForm, identity: Identity, answer: Answer, works: Sequence[Work], echoes: Sequence[str]
    ) -> AsyncIterator[bytes]:
        logprobs, generated, begun = [self._logprobs() for _ in works], 0, set[int]()
        async for number, piece in followed(self._service, answer, works):
            if isinstance(piece, Progress):
                if form.return_progress:
                    choices = [_choice(number, "", None, None)]
                    yield event_bytes(identity.head() | {"choices": choices} | told_progress(piece))
                continue
            generated += form.max_tokens != 0
            if form.echo and number not in begun:
                begun.add(number)
                scores, tokens = _scores(works[number], answer.scored[number]), _scored_tokens(works[number])
                spelled = logprobs[number].spell(scores, tokens) if tokens else None
                yield event_bytes(identity.head() | {"choices": [_choice(number, echoes[number], None, spelled)]})
            if form.max_tokens != 0 and (piece.text or piece.logprob):
                yield event_bytes(identity.head() | {"choices": [_piece(number, piece, logprobs[number])]})
            if piece.finish_reason is not None:
                yield event_bytes(identity.head() | {"choices": [_choice(number, "", piece.finish_reason, None)]})
        if form.usage_in_stream:
            yield event_bytes(identity.head() | {"choices": []} | counts(works, generated, answer, form))
        yield DONE


def _nothing(found: Generation) -> Generation:
    """Return an answer without tokens: behind a prompt that is only scored, one is drawn all the same."""
    return replace(found, text="", token_ids=(), finish_reason="length", logprobs=())


def _scores(work: Work, found: Sequence[TokenLogprob]) -> list[TokenLogprob | None]:
    """Return what is known of each token of a scored prompt: nothing of the first one."""
    return [None, *found] if work.scored else []


def _scored_tokens(work: Work) -> list[int]:
    tokens: list[int] = work.prompt.tolist() if work.scored else []
    return tokens


def _piece(number: int, piece: Piece, logprobs: CompletionLogprobs) -> dict[str, Any]:
    spelled = None if piece.logprob is None else logprobs.spell([piece.logprob], [piece.token_id])
    return _choice(number, piece.text, None, spelled)


def _choice(number: int, text: str, reason: str | None, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": reason}
