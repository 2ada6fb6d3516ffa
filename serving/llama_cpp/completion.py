"""`/completion` of llama.cpp's server: text that follows a text, in its shape."""

import math
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import numpy as np
from fastapi import Request
from numpy.typing import NDArray
from starlette.responses import Response

from spike_export.engines.generation.generated_text import Generation, Piece, TokenLogprob
from spike_export.serving.llama_cpp.completion_form import CompletionForm
from spike_export.serving.openai.errors import RequestError
from spike_export.serving.openai.exchange import answered, followed, timings, told_progress
from spike_export.serving.openai.json_text import event_bytes
from spike_export.serving.openai.logprobs import chat_logprob
from spike_export.serving.openai.requests import encoded, new_tokens, plain_tokens, require_model, works_of
from spike_export.serving.scheduling.answer import Answer, Progress
from spike_export.serving.scheduling.batch import Work
from spike_export.serving.service import Service


class Completion:
    """The endpoint."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, form: CompletionForm, request: Request) -> Response:
        """Answer one or several prompts; several in one piece are a list."""
        require_model(self._service, form.model)
        prompts = [await self._tokens(prompt) for prompt in form.prompts]
        sizes = [self._size(len(prompt), form.n_predict) for prompt in prompts]
        works = await works_of(self._service, form, prompts, sizes, form.n_probs or None)
        told = [_Told(self._service, form, number, work) for number, work in enumerate(works)]

        def whole(found: Sequence[Generation], answer: Answer) -> Any:
            bodies = [one.whole(generation, answer) for one, generation in zip(told, found, strict=True)]
            return bodies if len(bodies) > 1 else bodies[0]

        def events(answer: Answer) -> AsyncIterator[bytes]:
            return self._events(told, answer, works)

        return await answered(self._service, request, works, whole, events if form.stream else None)

    async def _tokens(self, prompt: str | list[int | str]) -> NDArray[np.int64]:
        """Return a prompt's tokens. As a text's, they begin with BOS once, whether the prefix holds it or they do."""
        if isinstance(prompt, str):
            return (await encoded(self._service, [prompt], "prompt"))[0]
        parts = [await self._part(part, first=place == 0) for place, part in enumerate(prompt)]
        manifest, tokens = self._service.model.manifest, np.concatenate(parts)
        held = manifest.prefix is not None and manifest.prefix.holds_bos
        return tokens[1:] if held and len(tokens) > 1 and tokens[0] == manifest.bos_token_id else tokens

    async def _part(self, part: int | str, *, first: bool) -> NDArray[np.int64]:
        if isinstance(part, str) and not first:
            return np.array(await plain_tokens(self._service, part) if part else [], np.int64)
        return (await encoded(self._service, [part if isinstance(part, str) else [part]], "prompt"))[0]

    def _size(self, prompt_tokens: int, asked: int) -> int:
        if not asked:
            raise RequestError("n_predict is 0; expected -1, or at least 1", param="n_predict")
        room = max(1, self._service.limits.room(prompt_tokens))
        return new_tokens(self._service, prompt_tokens, None, room if asked < 0 else min(asked, room), "n_predict")

    async def _events(self, told: Sequence["_Told"], answer: Answer, works: Sequence[Work]) -> AsyncIterator[bytes]:
        async for number, piece in followed(self._service, answer, works):
            one = told[number]
            if isinstance(piece, Progress):
                if one.form.return_progress:
                    yield event_bytes(one.event() | told_progress(piece))
                continue
            yield event_bytes(one.piece(piece))
            if piece.finish_reason is not None:
                yield event_bytes(one.end(piece.finish_reason, answer) | {"content": "", "tokens": []})


class _Told:
    """One prompt's answer as it is told: piece by piece, and at its end."""

    def __init__(self, service: Service, form: CompletionForm, number: int, work: Work) -> None:
        self._service, self.form, self._number, self._work = service, form, number, work
        self._text, self._tokens = "", list[int]()

    def piece(self, piece: Piece) -> dict[str, Any]:
        """Return the event of the next piece."""
        self._text += piece.text
        self._tokens.append(piece.token_id)
        found = [] if piece.logprob is None else [piece.logprob]
        return self.event(piece.text, piece.token_id) | self._probabilities(found)

    def event(self, text: str = "", *tokens: int) -> dict[str, Any]:
        """Return an event before the end, with what it adds."""
        counts = {"tokens_predicted": len(self._tokens), "tokens_evaluated": len(self._work.prompt)}
        return {"index": self._number, "content": text, "tokens": list(tokens), "stop": False, **counts}

    def whole(self, found: Generation, answer: Answer) -> dict[str, Any]:
        """Return the answer in one piece, with the fields that are wanted."""
        self._text, self._tokens = found.text, list(found.token_ids)
        tokens = list(found.token_ids) if self.form.return_tokens else []
        body = {"content": found.text, "tokens": tokens} | self.end(found.finish_reason, answer)
        body |= self._probabilities(found.logprobs or ())
        wanted = self.form.response_fields
        return {name: _inner(body, name) for name in wanted if _inner(body, name) is not None} if wanted else body

    def end(self, reason: str, answer: Answer) -> dict[str, Any]:
        """Return what is told at the end."""
        options, prompt, cached = self._work.options, len(self._work.prompt), answer.reused[self._number]
        short = self.form.n_predict < 0 or self.form.n_predict > options.max_new_tokens
        ended_by_token = bool(self._tokens) and self._tokens[-1] in options.eos_token_ids
        text = self._service.model.tokenizer.backend_tokenizer
        return {
            "index": self._number,
            "stop": True,
            "model": self._service.settings.model,
            "tokens_predicted": len(self._tokens),
            "tokens_evaluated": prompt,
            "tokens_cached": cached,
            "generation_settings": self._settings(),
            "prompt": text.decode(self._work.prompt.tolist(), skip_special_tokens=False),
            "has_new_line": "\n" in self._text,
            "truncated": reason == "length" and short,
            "stop_type": "limit" if reason == "length" else "eos" if ended_by_token else "word",
            "timings": timings(prompt, cached, len(self._tokens), answer),
        }

    def _settings(self) -> dict[str, Any]:
        options = self._work.options
        return {
            "n_predict": self.form.n_predict,
            "seed": -1 if options.seed is None else options.seed,
            "temperature": options.temperature if options.do_sample else 0.0,
            "top_k": options.top_k,
            "top_p": options.top_p,
            "min_p": options.min_p,
            "repeat_penalty": options.repetition_penalty,
            "presence_penalty": options.presence_penalty,
            "frequency_penalty": options.frequency_penalty,
            "logit_bias": [
                {"token": token, "bias": bias if math.isfinite(bias) else None} for token, bias in options.logit_bias
            ],
            "stop": list(options.stop_strings),
            "ignore_eos": options.ignore_eos,
            "n_probs": self.form.n_probs,
            "stream": bool(self.form.stream),
        }

    def _probabilities(self, found: Sequence[TokenLogprob]) -> dict[str, Any]:
        if not found:
            return {}
        text = self._service.model.tokenizer.backend_tokenizer
        entries = [chat_logprob(each, text) for each in found]
        return {"completion_probabilities": _drawn(entries) if self.form.post_sampling_probs else entries}


def _drawn(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return entries with probabilities in place of their logarithms; what cannot be drawn is left out."""
    return [
        _probability(entry) | {"top_probs": [_probability(top) for top in entry["top_logprobs"] if _possible(top)]}
        for entry in entries
    ]


def _probability(entry: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: entry[name] for name in ("id", "token", "bytes")}
    return kept | {"prob": math.exp(entry["logprob"])}


def _possible(entry: Mapping[str, Any]) -> bool:
    return math.exp(entry["logprob"]) > 0


def _inner(body: Mapping[str, Any], name: str) -> Any:
    """Return the field of a name, in which slashes lead inwards; None where there is none."""
    found: Any = body
    for part in name.split("/"):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found
