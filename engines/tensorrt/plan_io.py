"""What a plan's engine takes and gives, read from the engine itself."""

from dataclasses import dataclass
from typing import Any

import torch

from spike_export.artifacts.errors import EngineError

LOGITS, INPUT_IDS, ATTENTION_MASK = "logits", "input_ids", "attention_mask"
WRITE_INDICES, FRESH = "write_indices", "fresh"
_PAST, _PRESENT = "past_key_values.", "present."

_KNOWN_INPUTS = frozenset({INPUT_IDS, ATTENTION_MASK, WRITE_INDICES, FRESH})
_TORCH_TYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "BOOL": torch.bool,
}
"""Member of `trt.DataType` → torch's type."""


@dataclass(frozen=True, slots=True)
class CacheTensor:
    """One layer's keys or values, as input and as output."""

    past: str
    present: str


@dataclass(frozen=True, slots=True)
class PlanIo:
    """Inputs and outputs of a decoder's engine.

    Attributes:
        cache: Layer by layer, keys before values.
        static: The cache is a buffer that the engine writes in place; else `present` is a tensor of its own.
        fresh: There is an input whose length says whether sequences are fresh: a static cache with a prefix.
        kv_heads: Of the cache.
        head_dim: Of the cache.
        slots: Length of a static cache's buffer; None for a dynamic one.
        cache_dtype: Of its elements.
        vocab: Size of the vocabulary.
        logits_dtype: Of the output.
    """

    cache: tuple[CacheTensor, ...]
    static: bool
    fresh: bool
    kv_heads: int
    head_dim: int
    slots: int | None
    cache_dtype: torch.dtype
    vocab: int
    logits_dtype: torch.dtype

    def cache_shape(self, rows: int, slots: int) -> tuple[int, int, int, int]:
        """Return the shape of one cache tensor."""
        return (rows, self.kv_heads, slots, self.head_dim)


def read_plan_io(trt: Any, engine: Any, plan: str) -> PlanIo:
    """Read an engine's inputs and outputs.

    Args:
        trt: The bindings.
        engine: Deserialized.
        plan: Its name in messages.

    Raises:
        EngineError: The plan is not one of our decoders, or its static cache is not written in place.
    """
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = {name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT}
    outputs = set(names) - inputs
    pasts = sorted((name for name in inputs if name.startswith(_PAST)), key=_place)
    cache = tuple(CacheTensor(past, _PRESENT + past.removeprefix(_PAST)) for past in pasts)
    strange = inputs - _KNOWN_INPUTS - set(pasts)
    static = WRITE_INDICES in inputs
    wanted = {LOGITS, *(tensor.present for tensor in cache)}
    if strange or not cache or outputs != wanted or INPUT_IDS not in inputs or static == (ATTENTION_MASK in inputs):
        odd = ", ".join(sorted(strange | (outputs ^ wanted))) or "its inputs"
        raise EngineError(f"{plan}: the plan is not one of a decoder that this version exports ({odd}); build it again")
    _require_device_tensors(trt, engine, names, plan)
    if static:
        _require_in_place(engine, cache, plan)
    _, kv_heads, slots, head_dim = engine.get_tensor_shape(pasts[0])
    return PlanIo(
        cache=cache,
        static=static,
        fresh=FRESH in inputs,
        kv_heads=int(kv_heads),
        head_dim=int(head_dim),
        slots=int(slots) if static else None,
        cache_dtype=_torch_type(engine.get_tensor_dtype(pasts[0]), pasts[0], plan),
        vocab=int(engine.get_tensor_shape(LOGITS)[-1]),
        logits_dtype=_torch_type(engine.get_tensor_dtype(LOGITS), LOGITS, plan),
    )


def _place(past: str) -> tuple[int, str]:
    layer, kind = past.removeprefix(_PAST).split(".")
    return int(layer), kind


def _require_device_tensors(trt: Any, engine: Any, names: list[str], plan: str) -> None:
    for name in names:
        if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
            raise EngineError(
                f"{plan}: the plan needs {name} in host memory, for which the GPU has to wait; build it again"
            )


def _require_in_place(engine: Any, cache: tuple[CacheTensor, ...], plan: str) -> None:
    """Without the alias, one address for both would let the engine read what it has already written over."""
    for tensor in cache:
        if engine.get_aliased_input_tensor(tensor.present) != tensor.past:
            raise EngineError(
                f"{plan}: the plan does not write {tensor.present} into {tensor.past}, though the bundle's cache is "
                "static; export with --kv-cache dynamic and build again"
            )


def _torch_type(dtype: Any, name: str, plan: str) -> torch.dtype:
    if dtype.name not in _TORCH_TYPES:
        raise EngineError(f"{plan}: {name} is of type {dtype.name}, which the runtime does not feed; build it again")
    return _TORCH_TYPES[dtype.name]
