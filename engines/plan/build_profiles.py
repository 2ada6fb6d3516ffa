"""Optimization profiles of the decoder graph: which shapes a plan accepts, and which it is tuned for."""

from collections.abc import Sequence
from dataclasses import dataclass

from spike_export.artifacts.errors import EngineError
from spike_export.engines.plan.build_options import DEFAULT_CONTEXT, BatchRange, BuildOptions, ProfileName

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GraphInput:
    """A graph input; None stands for a dimension that is known only when it runs."""

    name: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class ShapeRange:
    """Smallest, tuned-for and largest shape of one input."""

    smallest: Shape
    typical: Shape
    largest: Shape


@dataclass(frozen=True, slots=True)
class Profile:
    """The shapes of all inputs in one use of the plan."""

    name: ProfileName
    shapes: dict[str, ShapeRange]


@dataclass(frozen=True, slots=True)
class Limits:
    """Resolved sizes, in tokens.

    Attributes:
        context: Most own tokens of a sequence; a static cache has room for as many or more.
        typical_prompt: New tokens prefill is tuned for.
        max_prompt: Most new tokens of one call.
        prefix: P, tokens the graph itself puts into the cache of a fresh sequence.
        slots: Length of a static cache's buffer where it is not to be the graph's own.
    """

    batch: BatchRange
    context: int
    typical_prompt: int
    max_prompt: int
    prefix: int
    slots: int | None = None


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Sizes of one call: new tokens, length of the cache handed in, own tokens the mask speaks of.

    Attributes:
        fresh: F of a static cache, whose length is the graph's and whose callers give no mask.
    """

    new: int
    past: int
    own: int
    fresh: int


def resolve_limits(
    options: BuildOptions, prefix: int, max_positions: int | None, capacity: int | None = None
) -> Limits:
    """Fill in the defaults and compare them with the model.

    Args:
        options: What is asked for.
        prefix: P.
        max_positions: Own tokens the model can place, prefix not counted; None when unknown.
        capacity: Own tokens a static cache has room for; None for a dynamic one.

    Raises:
        EngineError: More context is asked for than the model or its cache has, or a call larger than the context.
    """
    slots = None
    if options.capacity is not None:
        _require_capacity(options.capacity, capacity)
        slots, capacity = prefix + options.capacity, options.capacity
    if capacity is not None and options.max_context is not None and options.max_context > capacity:
        remedy = "export with a larger --capacity" if slots is None else "build with a larger --plan-capacity"
        owner = "bundle" if slots is None else "plan"
        raise EngineError(
            f"max_context is {options.max_context}, but the {owner}'s static cache holds {capacity} tokens; {remedy}"
        )
    ceiling = max_positions or DEFAULT_CONTEXT
    # A static cache has its length whatever the context is: there is no reason to use less of it.
    context = options.max_context or capacity or min(DEFAULT_CONTEXT, ceiling)
    if max_positions is not None and context > max_positions:
        raise EngineError(
            f"max_context is {context}, but the model takes {max_positions} tokens at most; give a smaller "
            "--max-context"
        )
    longest = options.max_prompt or context
    if longest > context:
        raise EngineError(
            f"max_prompt is {longest}, more than max_context ({context}); give a smaller --max-prompt or a "
            "larger --max-context"
        )
    return Limits(options.batch, context, min(options.typical_prompt, longest), longest, prefix, slots)


def _require_capacity(wanted: int, capacity: int | None) -> None:
    if capacity is None:
        raise EngineError(
            f"the plan's capacity is {wanted}, but the bundle's cache grows with the sequence; leave --plan-capacity "
            "out, or export with --kv-cache static"
        )
    if not 2 <= wanted <= capacity:
        raise EngineError(
            f"the plan's capacity is {wanted}; expected 2 to {capacity} tokens, the bundle's: export with a larger "
            f"--capacity for more"
        )


def make_profiles(inputs: Sequence[GraphInput], names: Sequence[ProfileName], limits: Limits) -> tuple[Profile, ...]:
    """Return one profile per name, in that order.

    Raises:
        EngineError: The graph has an input of another kind than those of the decoder.
    """
    return tuple(_profile(inputs, name, limits) for name in names)


def _profile(inputs: Sequence[GraphInput], name: ProfileName, limits: Limits) -> Profile:
    batch = limits.batch
    if name == "prefill" and any(graph_input.name == "fresh" for graph_input in inputs):
        # A prefix enters a static cache row by row, and at the start of a sequence only: with a free batch or a free
        # length of `fresh`, TensorRT-RTX 1.7 fails inside its code generator on three layers and more. A row's part of
        # the buffer is contiguous, so that it can be bound alone.
        batch = BatchRange(1, 1, 1)
    sizes = _sizes(name, limits)
    return Profile(name, {graph_input.name: _shape_range(graph_input, sizes, batch) for graph_input in inputs})


def _sizes(name: ProfileName, limits: Limits) -> tuple[_Sizes, _Sizes, _Sizes]:
    """Return smallest, typical and largest sizes; each is a call that could happen.

    For every call `past + new = own + P`, where P is missing from `past` in a fresh sequence only. TensorRT
    evaluates the graph's shape arithmetic at each of the three, so they must agree with one another. That is why
    `own` reaches beyond the context in the largest prefill: the longest prompt after the longest past.
    """
    p, context = limits.prefix, limits.context
    if name == "decode":
        half = max(context // 2, 2)
        return (
            _Sizes(1, p + 1, 2, fresh=0),
            _Sizes(1, p + half - 1, half, fresh=0),
            _Sizes(1, p + context - 1, context, fresh=0),
        )
    typical, longest = limits.typical_prompt, limits.max_prompt
    return (
        _Sizes(1, 0, 1, fresh=1),
        _Sizes(typical, 0, typical, fresh=1),
        _Sizes(longest, p + context - 1, context - 1 + longest, fresh=1),
    )


def _shape_range(graph_input: GraphInput, sizes: tuple[_Sizes, _Sizes, _Sizes], batch: BatchRange) -> ShapeRange:
    batches = (batch.smallest, batch.typical, batch.largest)
    shapes = [_shape(graph_input, rows, size) for rows, size in zip(batches, sizes, strict=True)]
    return ShapeRange(*shapes)


def _shape(graph_input: GraphInput, rows: int, size: _Sizes) -> Shape:
    name, shape = graph_input.name, graph_input.shape
    if name in ("input_ids", "position_ids") and len(shape) == 2:
        return (rows, size.new)
    if name == "attention_mask" and len(shape) == 2:
        return (rows, size.own)
    if name == "write_indices" and len(shape) == 1:
        return (rows,)
    if name == "fresh" and len(shape) == 1:
        return (size.fresh,)
    if name.startswith("past_key_values.") and len(shape) == 4 and shape[1] is not None and shape[3] is not None:
        return (rows, shape[1], size.past if shape[2] is None else shape[2], shape[3])
    raise EngineError(
        f"graph input {name!r} of shape {list(shape)} is not one of the decoder (input_ids, attention_mask, "
        "position_ids, write_indices, fresh, past_key_values.N.key|value); export the bundle again"
    )
