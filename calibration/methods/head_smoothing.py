"""The smoothing of the head's input: which strength brings the logits of a head in INT8 closest to the model's own.

A token's scale at the head is set by a few channels of the final norm's output that are far larger than the rest.
They are divided there, in the norm's gain, and multiplied into the columns of the head's own INT8 weight. Candidates
read the unquantized model's states, so that nothing but the head is judged.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.recipe import SMOOTHED_HEAD, HeadCandidate, SmoothingPlan
from spike_export.calibration.decoder.equivalent.smoothing import Form, smoothing_plan, smoothing_scales
from spike_export.calibration.decoder.layerwise import Decoder
from spike_export.calibration.decoder.perplexity import ReferenceStates, content_states, divergence_sum
from spike_export.checkpoint.checkpoint import LM_HEAD, Checkpoint
from spike_export.checkpoint.row_blocks import block_rows, row_blocks

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float32]

CANDIDATES: tuple[tuple[Form, float], ...] = (
    ("smoothquant", 0.3),
    ("smoothquant", 0.4),
    ("smoothquant", 0.5),
    ("smoothquant", 0.6),
    ("smoothquant", 0.7),
    ("outlier-suppression", 0.5),
    ("outlier-suppression", 0.25),
)
"""Formulas and parameters that compete, besides no smoothing at all."""

JUDGED_TOKENS = 512
"""About how many tokens compare the candidates: each costs two products with the whole vocabulary."""


@dataclass(frozen=True)
class HeadSmoothing:
    """The chosen smoothing of the head's input, None for none, and what competed, the chosen one first."""

    plan: SmoothingPlan | None = None
    candidates: tuple[HeadCandidate, ...] = ()


def choose_head_smoothing(
    decoder: Decoder, windows: NDArray[np.int64], content_length: int, reference: ReferenceStates
) -> HeadSmoothing:
    """Compare the candidates; the least divergence from the logits of the model's own head wins.

    Args:
        decoder: The model, rotated where it is to be.
        windows: [samples, length] Windows that the scales are made of; none of them judges.
        content_length: Trailing tokens of a window that are content.
        reference: States and head of the same model on the windows that judge.
    """
    inputs, weights = _input_amax(decoder, windows, content_length), _column_amax(decoder.checkpoint)
    plans: list[tuple[str, SmoothingPlan | None]] = [("none", None)]
    for form, parameter in CANDIDATES:
        scales = smoothing_scales(form, parameter, inputs, weights)
        plans.append((f"{form} {parameter}", smoothing_plan(form, parameter, scales)))
    stride = max(1, sum(len(states) for states in reference.states) // JUDGED_TOKENS)
    judged = [states[::stride] for states in reference.states]
    scored = [(_divergence(decoder, plan, reference, judged), name, plan) for name, plan in plans]
    # `none` stands first, and is taken where nothing is better.
    scored.sort(key=lambda each: each[0])
    verdicts = ("chosen", *("further from the unquantized head" for _ in scored[1:]))
    candidates = (
        HeadCandidate(name=name, divergence=divergence, verdict=verdict)
        for (divergence, name, _), verdict in zip(scored, verdicts, strict=True)
    )
    return HeadSmoothing(scored[0][2], tuple(candidates))


def _divergence(
    decoder: Decoder, plan: SmoothingPlan | None, reference: ReferenceStates, judged: "Sequence[torch.Tensor]"
) -> float:
    head = decoder.head(SMOOTHED_HEAD, plan)
    total = sum(divergence_sum(reference.head, states, head, states) for states in judged)
    return total / sum(len(states) for states in judged)


def _input_amax(decoder: Decoder, windows: NDArray[np.int64], content_length: int) -> Floats:
    """Return the abs-max [hidden] of the final norm's output over the windows' content."""
    head = decoder.head()
    amax = np.zeros(decoder.config.hidden_size, np.float32)
    for _, states in content_states(decoder, windows, content_length):
        np.maximum(amax, head.normed(states).abs().amax(0).float().cpu().numpy(), out=amax)
    return amax


def _column_amax(checkpoint: Checkpoint) -> Floats:
    """Return the abs-max [hidden] of the head's columns; where the source can, some rows are read at a time."""
    height, width = checkpoint.stored_shape(LM_HEAD)
    block, amax = np.empty((block_rows(width), width), np.float32), np.zeros(width, np.float32)
    with checkpoint.block_reader(LM_HEAD) as read:
        for rows in row_blocks((height, width)):
            values = block[: rows.stop - rows.start]
            read(rows, values)
            np.maximum(amax, np.maximum(values.max(axis=0), -values.min(axis=0)), out=amax)
    return amax
