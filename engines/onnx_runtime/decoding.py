"""Decoding in ONNX Runtime, over either cache."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.errors import EngineError
from spike_export.engines.generation.decoding import DecodedStep, require_finite
from spike_export.engines.generation.draft_length import DraftLength
from spike_export.engines.generation.options import GenerationOptions
from spike_export.engines.generation.prompt_lookup import PromptLookup
from spike_export.engines.generation.sampling import Sampler, seen_tokens
from spike_export.engines.generation.slots import Slots
from spike_export.engines.onnx_runtime.prefill_chunk import prefill_chunk
from spike_export.engines.onnx_runtime.sequences import StaticSequences
from spike_export.engines.onnx_runtime.session import BundleSession
from spike_export.engines.onnx_runtime.slots import open_slots


@dataclass(frozen=True)
class OnnxDecoding:
    """A `Decoding` over a session that `open_for_generation` opened.

    Attributes:
        drafts: How drafts of the next tokens go, which one call verifies; None for a call for each token. Drafts are
            made for single sequences over a static cache.
    """

    session: BundleSession
    drafts: DraftLength | None = None

    @property
    def context(self) -> int:
        """Most own tokens of a sequence."""
        manifest = self.session.manifest
        return manifest.capacity or manifest.max_position_embeddings

    def decode(self, prompts: Sequence[NDArray[np.int64]], options: GenerationOptions) -> Iterator[DecodedStep]:
        """See `Decoding`."""
        require_context(prompts, options, self.context)
        return self._steps(prompts, options)

    def open_slots(self, rows: int) -> Slots:
        """See `SlotRuntime`."""
        return open_slots(self.session, rows)

    def close(self) -> None:
        """See `Decoding`. A session lives as long as somebody holds it: others may share it."""

    def _steps(self, prompts: Sequence[NDArray[np.int64]], options: GenerationOptions) -> Iterator[DecodedStep]:
        sequences = self.session.begin(len(prompts))
        if isinstance(sequences, StaticSequences):
            if self.drafts is not None and sequences.verifies and len(prompts) == 1:
                yield from _drafted_steps(sequences, prompts[0], options, self.drafts)
                return
            logits = np.concatenate([_read_prompt(sequences, row, prompt) for row, prompt in enumerate(prompts)])
        else:
            tokens, counts = _padded(prompts)
            logits = _behind(sequences.step(tokens, counts), counts)
        sampler, seen = Sampler(options, len(prompts)), seen_tokens(prompts, logits.shape[-1], options)
        for remaining in reversed(range(options.max_new_tokens)):
            require_finite(np.isfinite(logits).all(axis=1), "export the bundle with --dtype float32")
            drawn = sampler.draw(logits, seen)
            yield drawn
            if remaining:
                logits = _behind(sequences.step(drawn.tokens[:, None]))


def _drafted_steps(
    sequences: StaticSequences, prompt: NDArray[np.int64], options: GenerationOptions, drafts: DraftLength
) -> Iterator[DecodedStep]:
    """Draw the tokens of one sequence, several of one call where a draft of them was right.

    Each token is drawn as it would be alone, from logits of its own, so that drafts change no distribution. A draft is
    kept as far as it was drawn.
    """
    logits, lookup = _read_prompt(sequences, 0, prompt), PromptLookup(prompt.tolist())
    sampler, seen = Sampler(options, 1), seen_tokens([prompt], logits.shape[-1], options)
    remaining, draft, seconds = options.max_new_tokens, list[int](), 0.0
    while True:
        token, accepted = -1, -1
        for row in logits:
            require_finite(np.isfinite(row[None]).all(axis=1), "export the bundle with --dtype float32")
            drawn = sampler.draw(row[None], seen)
            token, accepted, remaining = int(drawn.tokens[0]), accepted + 1, remaining - 1
            lookup.append(token)
            yield drawn
            if accepted < len(draft) and token != draft[accepted]:
                break
        if not remaining:
            return
        sequences.forget(0, len(draft) - accepted)
        if seconds:
            drafts.record(len(draft), accepted, seconds)
        draft = lookup.draft(min(drafts.choose(), remaining - 1, sequences.room(0) - 1))
        started = time.perf_counter()
        logits = sequences.extend(0, np.array([token, *draft]), positions=len(draft) + 1)[0].astype(np.float32)
        seconds = time.perf_counter() - started


def require_context(prompts: Sequence[NDArray[np.int64]], options: GenerationOptions, context: int) -> None:
    """Refuse prompts that leave no room for what is to be generated.

    The last token drawn is never fed, so that it needs no room.

    Raises:
        EngineError: Names the first such row, counted from 0, and what would fit.
    """
    if not prompts:
        raise EngineError("there is no prompt; give at least one")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise EngineError(f"prompt {row} has no tokens; give at least one")
        room = context + 1 - len(prompt)
        if room < 1:
            raise EngineError(
                f"prompt {row} has {len(prompt)} tokens, and a sequence has room for {context}; shorten it"
            )
        if options.max_new_tokens > room:
            raise EngineError(
                f"prompt {row} has {len(prompt)} tokens and max_new_tokens is {options.max_new_tokens}, but a sequence "
                f"has room for {context}; ask for at most {room} new ones"
            )


def _read_prompt(sequences: StaticSequences, row: int, prompt: NDArray[np.int64]) -> NDArray[np.float32]:
    """Feed a prompt [tokens] to its row; return the logits [1, vocab] behind it.

    Row by row, so that no row pays for another's length.
    """
    chunk = prefill_chunk(sequences.manifest)
    first, *more = (prompt[start : start + chunk] for start in range(0, len(prompt), chunk))
    logits = sequences.admit(row, first)
    for part in more:
        logits = sequences.extend(row, part)
    return _behind(logits)


def _padded(prompts: Sequence[NDArray[np.int64]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return prompts as one array [rows, longest], padded on the right, and how many tokens of each row count.

    The sequences turn it round where their cache wants that: the last column is each row's last token then.
    """
    counts = np.array([len(prompt) for prompt in prompts])
    tokens = np.zeros((len(prompts), counts.max()), np.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return tokens, counts


def _behind(logits: NDArray[np.float32], counts: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
    """Return the logits [rows, vocab] of each row's last token, of the last column or of all [rows, ., vocab]."""
    if counts is None or logits.shape[1] == 1:
        return logits[:, -1].astype(np.float32, copy=False)
    return logits[np.arange(len(counts)), counts - 1].astype(np.float32, copy=False)
