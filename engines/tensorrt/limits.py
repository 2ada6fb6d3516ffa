"""What a plan was built for, and whether a request is within it: asked before the engine is touched."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.errors import EngineError
from spike_export.engines.plan.build_options import ProfileName
from spike_export.engines.plan.sidecar import InputShapes, PlanSidecar, ProfileShapes
from spike_export.engines.tensorrt.plan_io import ATTENTION_MASK, FRESH, INPUT_IDS

_NO_SHAPES = InputShapes(min=(), opt=(), max=())


@dataclass(frozen=True, slots=True)
class PlanLimits:
    """Sizes, in sequences and in the caller's own tokens.

    Attributes:
        smallest_batch: Of a decode step.
        largest_batch: Of a decode step.
        prefill_batch: Most sequences of one prefill call.
        call: Most tokens per sequence of one prefill call.
        chunked: A longer prompt may enter in several calls. Not where a prefix enters a static cache: the prefill
            profile then takes fresh sequences only. And not with a rope by length, which would rotate the parts
            differently.
        context: Most tokens of a sequence, prompt and continuation.
        prefix: P, slots of the cache that the graph fills by itself.
        rope: Type of a rope that depends on a sequence's length.
    """

    smallest_batch: int
    largest_batch: int
    prefill_batch: int
    call: int
    chunked: bool
    context: int
    prefix: int
    rope: str | None = None


def plan_limits(sidecars: Sequence[PlanSidecar]) -> PlanLimits:
    """Return the limits of a plan with both profiles, or of a prefill plan and a decode plan.

    Raises:
        EngineError: A profile is missing or there twice, or the plans are not of one build.
    """
    first = sidecars[0]
    for other in sidecars[1:]:
        for what in ("bundle_sha256", "prefix", "max_context", "backend.name", "backend.version"):
            mine, theirs = (_value(sidecar, what) for sidecar in (first, other))
            if mine != theirs:
                raise EngineError(f"the plans do not belong together: {what} is {mine} and {theirs}; build both again")
    prefill, decode = profile_of(sidecars, "prefill"), profile_of(sidecars, "decode")
    batches, calls = decode.inputs[INPUT_IDS], prefill.inputs[INPUT_IDS]
    smallest, largest = batches.min[0], batches.max[0]
    if ATTENTION_MASK in prefill.inputs:  # all rows in one call, there too
        smallest, largest = max(smallest, calls.min[0]), min(largest, calls.max[0])
    elif calls.min[0] > 1:
        raise EngineError(
            f"rows enter a static cache one by one, and the prefill profile begins at {calls.min[0]} sequences; build "
            "again with a smallest batch of 1"
        )
    return PlanLimits(
        smallest_batch=smallest,
        largest_batch=largest,
        prefill_batch=calls.max[0],
        call=calls.max[1],
        chunked=FRESH not in prefill.inputs and first.rope_by_length is None,
        context=first.max_context,
        prefix=first.prefix,
        rope=first.rope_by_length,
    )


def profile_of(sidecars: Sequence[PlanSidecar], name: ProfileName) -> ProfileShapes:
    """Return the only profile of that name.

    Raises:
        EngineError: There is none, or more than one.
    """
    found = [profile for sidecar in sidecars for profile in sidecar.profiles if profile.name == name]
    if len(found) != 1:
        have = ", ".join(profile.name for sidecar in sidecars for profile in sidecar.profiles) or "none"
        raise EngineError(
            f"decoding takes one prefill and one decode profile, and there are: {have}; build with --profiles both, or "
            "open the prefill plan and the decode plan together"
        )
    if len(found[0].inputs.get(INPUT_IDS, _NO_SHAPES).max) != 2:
        raise EngineError(f"the plan's sidecar gives no shape of {INPUT_IDS} in its {name} profile; build it again")
    return found[0]


def require_fit(limits: PlanLimits, prompts: Sequence[NDArray[np.int64]], new_tokens: int, vocab: int) -> None:
    """Refuse what the plan was not built for.

    Args:
        limits: The plan's.
        prompts: Per row the own tokens [tokens].
        new_tokens: How many each row may get.
        vocab: Size of the vocabulary.

    Raises:
        EngineError: Both figures are named.
    """
    for row, prompt in enumerate(prompts):
        if prompt.ndim != 1 or not prompt.size:
            raise EngineError(f"prompt {row} has the shape {list(prompt.shape)}; expected one token or more in a row")
        if not 0 <= prompt.min() <= prompt.max() < vocab:
            wrong = int(prompt.max() if prompt.max() >= vocab else prompt.min())
            raise EngineError(f"prompt {row} holds token {wrong}; the vocabulary has 0 to {vocab - 1}")
    rows = len(prompts)
    if not limits.smallest_batch <= rows <= limits.largest_batch:
        remedy = f"give fewer at a time, or build again with --max-batch {rows}"
        if rows < limits.smallest_batch:
            remedy = f"give {limits.smallest_batch} or more"
        raise EngineError(
            f"a batch of {rows} was given and the plan was built for {limits.smallest_batch} to "
            f"{limits.largest_batch} sequences; {remedy}"
        )
    row = max(range(rows), key=lambda index: len(prompts[index]))
    longest = len(prompts[row])
    # The last token is drawn and not fed any more.
    needed = longest + new_tokens - 1
    if needed > limits.context:
        raise EngineError(
            f"prompt {row} has {longest} tokens and may get {new_tokens}: that takes a context of {needed}, and the "
            f"plan was built for {limits.context}; ask for fewer, or build again with --max-context {needed}"
        )
    if longest > limits.call and not limits.chunked:
        reason = "a prefix enters a static cache"
        if limits.rope is not None:
            reason = f"a rope of type {limits.rope}, which depends on the length, has to rotate it"
        raise EngineError(
            f"prompt {row} has {longest} tokens and the plan takes {limits.call} in the one call in which {reason}; "
            "shorten it, or build again with a larger --max-prompt"
        )


def _value(sidecar: PlanSidecar, path: str) -> object:
    value: object = sidecar
    for name in path.split("."):
        value = getattr(value, name)
    return value
