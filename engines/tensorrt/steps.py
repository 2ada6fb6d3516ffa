"""A batch in progress on the GPU: its prompts enter the cache, then one token per row and step."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from spike_export.engines.tensorrt.buffers import Buffers, aligned, tensor_bytes
from spike_export.engines.tensorrt.decode_buckets import DecodeBucket, DecodeBuckets
from spike_export.engines.tensorrt.device import Device
from spike_export.engines.tensorrt.engines import LoadedPlans
from spike_export.engines.tensorrt.kv_cache import DynamicKvCache, StaticKvCache
from spike_export.engines.tensorrt.limits import PlanLimits
from spike_export.engines.tensorrt.plan_io import ATTENTION_MASK, FRESH, INPUT_IDS, LOGITS, WRITE_INDICES
from spike_export.engines.tensorrt.prefill import PrefillCall, dynamic_calls, static_calls
from spike_export.engines.tensorrt.station import Shape, Station

PREFILL_INPUTS, PREFILL_LOGITS = "inputs of the prompts", "logits of the prompts"
STEP_INPUTS, STEP_LOGITS = "inputs of a step", "logits of a step"
FIRST_LOGITS = "logits of the prompts' last tokens"

_INT64 = torch.int64


class Steps(Protocol):
    """One batch at a time. Both methods only queue work, in the device's `queue()`, and are to be called there."""

    def begin(self, prompts: Sequence[NDArray[np.int64]], new_tokens: int) -> torch.Tensor:
        """Begin a batch of fresh sequences, within the limits; return the last tokens' logits [rows, vocab] float32.

        Raises:
            EngineError: The GPU has not enough memory, or TensorRT refuses the call.
        """

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append a token to every row, [rows] int64; return the logits [rows, vocab] float32.

        The result is overwritten by the next step.
        """


def make_steps(plans: LoadedPlans, limits: PlanLimits, device: Device, buffers: Buffers, *, graphs: bool) -> Steps:
    """Return what runs batches of these plans.

    Args:
        plans: Loaded.
        limits: Theirs.
        device: Where they are.
        buffers: For all memory.
        graphs: Make CUDA graphs, where the backend leaves that to us.
    """
    if plans.io.static:
        return StaticSteps(plans, limits, device, buffers, graphs=graphs and not plans.compiles_at_run)
    return DynamicSteps(plans, limits, device, buffers)


class StaticSteps:
    """Over a static cache: rows of any lengths, each written at its own index. See `Steps`.

    Attributes:
        cache: Keys and values of all rows.
    """

    def __init__(
        self, plans: LoadedPlans, limits: PlanLimits, device: Device, buffers: Buffers, *, graphs: bool
    ) -> None:
        self._io, self._limits, self._device, self._buffers = plans.io, limits, device, buffers
        self.cache = StaticKvCache(plans.io, buffers)
        self._prefill = plans.station("prefill")
        self._buckets = DecodeBuckets(lambda: plans.station("decode"), device, graphs)
        self._bucket: DecodeBucket | None = None
        self._rows = 0
        self._last_only = _gives_last_only(self._prefill, self._shapes(1, min(2, limits.call), fresh=1))

    def begin(self, prompts: Sequence[NDArray[np.int64]], new_tokens: int) -> torch.Tensor:
        """See `Steps`; the cache has its size whatever `new_tokens` is."""
        # All logits of several prompts at once would take more memory than the call saves time.
        together = self._last_only and self.cache.rows_in_place
        calls = list(static_calls(prompts, self._limits, together=together))
        rows = self._rows = len(prompts)
        self._reserve(rows, calls)
        first = self._buffers.view(FIRST_LOGITS, (rows, self._io.vocab), torch.float32)
        for call in calls:
            logits = self._run_prefill(call)
            if call.ends:
                self.cache.settle(call.row)
                first[call.row : call.row + call.rows].copy_(logits[:, -1])
        self._bucket = self._buckets.bucket(rows, self._shapes(rows, 1, fresh=0), self._step_addresses)
        lengths = np.array([len(prompt) for prompt in prompts], np.int64)
        self._step_tensors()[WRITE_INDICES].copy_(self._device.upload(lengths))
        return first

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `Steps`."""
        assert self._bucket is not None, "a batch was begun"
        tensors = self._step_tensors()
        tensors[INPUT_IDS].copy_(tokens[:, None])
        self._bucket.enqueue()
        tensors[WRITE_INDICES].add_(1)
        return tensors[LOGITS][:, -1].float()

    def open_rows(self, rows: int, part: int) -> None:
        """Reserve memory for rows whose sequences come and go, in place of batches.

        Args:
            rows: Most sequences at once.
            part: Most tokens that a row reads in a call.

        Raises:
            EngineError: The GPU has not enough memory.
        """
        self._reserve(rows, [PrefillCall(0, np.zeros((1, part), np.int64), 0, ends=True)])

    def read(self, call: PrefillCall) -> torch.Tensor:
        """Let one row read tokens while the others stand still; return the last token's logits [1, vocab] float32.

        The result is overwritten by the next call.
        """
        self.cache.stage(call.row, fresh=not call.earlier)
        logits = self._run_prefill(call)
        self.cache.settle(call.row)
        return logits[:, -1].float()

    def step_first(self, tokens: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Write a token in each of the first rows; return the logits [rows, vocab] float32.

        Args:
            tokens: [rows] int64.
            indices: [rows] int64, own tokens in front of each.
        """
        self._rows = len(tokens)
        self._bucket = self._buckets.bucket(self._rows, self._shapes(self._rows, 1, fresh=0), self._step_addresses)
        self._step_tensors()[WRITE_INDICES].copy_(indices)
        return self.step(tokens)

    def _reserve(self, rows: int, calls: Sequence[PrefillCall]) -> None:
        widest = max(call.tokens.size for call in calls)
        logits = max(call.rows * (1 if self._last_only else call.tokens.shape[1]) for call in calls)
        io = self._io
        moved = self._buffers.reserve(
            {
                **self.cache.sizes(rows),
                PREFILL_INPUTS: aligned(widest * _INT64.itemsize) + rows * _INT64.itemsize,
                PREFILL_LOGITS: tensor_bytes((logits, io.vocab), io.logits_dtype),
                FIRST_LOGITS: tensor_bytes((rows, io.vocab), torch.float32),
                STEP_INPUTS: 2 * aligned(rows * _INT64.itemsize),
                STEP_LOGITS: tensor_bytes((rows, io.vocab), io.logits_dtype),
            }
        )
        # What steps of any batch size are bound to.
        if self.cache.reserved(rows, moved) or moved & {STEP_INPUTS, STEP_LOGITS}:
            self._buckets.clear()

    def _run_prefill(self, call: PrefillCall) -> torch.Tensor:
        shape = call.tokens.shape
        ids = self._buffers.view(PREFILL_INPUTS, shape, _INT64)
        indices = self._buffers.view(PREFILL_INPUTS, (call.rows,), _INT64, aligned(call.tokens.size * _INT64.itemsize))
        ids.copy_(self._device.upload(call.tokens))
        indices.fill_(call.earlier)
        logits_shape = (call.rows, 1 if self._last_only else shape[1], self._io.vocab)
        logits = self._buffers.view(PREFILL_LOGITS, logits_shape, self._io.logits_dtype)
        self._prefill.set_shapes(self._shapes(call.rows, shape[1], fresh=1))
        self._prefill.bind(_addresses({INPUT_IDS: ids, WRITE_INDICES: indices, LOGITS: logits}, fresh=self._io.fresh))
        self._prefill.bind(self.cache.addresses(call.row))
        self._prefill.enqueue()
        return logits

    def _step_tensors(self) -> dict[str, torch.Tensor]:
        rows, io = self._rows, self._io
        second = aligned(rows * _INT64.itemsize)
        return {
            INPUT_IDS: self._buffers.view(STEP_INPUTS, (rows, 1), _INT64),
            WRITE_INDICES: self._buffers.view(STEP_INPUTS, (rows,), _INT64, second),
            LOGITS: self._buffers.view(STEP_LOGITS, (rows, 1, io.vocab), io.logits_dtype),
        }

    def _step_addresses(self) -> dict[str, int]:
        return _addresses(self._step_tensors(), fresh=self._io.fresh) | self.cache.addresses(0)

    def _shapes(self, rows: int, columns: int, *, fresh: int) -> dict[str, Shape]:
        io = self._io
        assert io.slots is not None, "a static cache has slots"
        shapes: dict[str, Shape] = {INPUT_IDS: (rows, columns), WRITE_INDICES: (rows,)}
        if io.fresh:
            shapes[FRESH] = (fresh,)
        return shapes | {tensor.past: io.cache_shape(rows, io.slots) for tensor in io.cache}


class DynamicSteps:
    """Over a cache that grows: rows padded on the left, their padding hidden by the mask. See `Steps`."""

    def __init__(self, plans: LoadedPlans, limits: PlanLimits, device: Device, buffers: Buffers) -> None:
        self._io, self._limits, self._device, self._buffers = plans.io, limits, device, buffers
        self._cache = DynamicKvCache(plans.io, buffers)
        self._prefill, self._decode = plans.station("prefill"), plans.station("decode")
        self._cache.begin(limits.smallest_batch)
        columns = min(2, limits.call)
        self._last_only = _gives_last_only(self._prefill, self._shapes(limits.smallest_batch, columns, columns))
        self._pads = self._columns = torch.empty(0, dtype=_INT64)
        self._rows = self._own = 0

    def begin(self, prompts: Sequence[NDArray[np.int64]], new_tokens: int) -> torch.Tensor:
        """See `Steps`."""
        calls = list(dynamic_calls(prompts, self._limits))
        lengths = np.array([len(prompt) for prompt in prompts], np.int64)
        rows, longest = len(prompts), int(lengths.max())
        self._reserve(calls, longest + new_tokens - 1)
        self._cache.begin(rows)
        self._rows, self._own = rows, 0
        self._pads = self._device.upload(longest - lengths)[:, None]
        self._columns = torch.arange(longest + new_tokens, dtype=_INT64, device=self._device.device)
        for call in calls:
            logits = self._run(self._prefill, self._device.upload(call.tokens), PREFILL_LOGITS)
        first = self._buffers.view(FIRST_LOGITS, (rows, self._io.vocab), torch.float32)
        first.copy_(logits[:, -1])
        return first

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `Steps`."""
        return self._run(self._decode, tokens[:, None], STEP_LOGITS)[:, -1].float()

    def _reserve(self, calls: Sequence[PrefillCall], own: int) -> None:
        io, rows = self._io, calls[0].rows
        columns = max(call.tokens.shape[1] for call in calls)
        logits = 1 if self._last_only else columns
        self._buffers.reserve(
            {
                **self._cache.sizes(rows, self._limits.prefix + own),
                PREFILL_INPUTS: aligned(rows * columns * _INT64.itemsize) + rows * own * _INT64.itemsize,
                PREFILL_LOGITS: tensor_bytes((rows, logits, io.vocab), io.logits_dtype),
                FIRST_LOGITS: tensor_bytes((rows, io.vocab), torch.float32),
                STEP_LOGITS: tensor_bytes((rows, io.vocab), io.logits_dtype),
            }
        )

    def _run(self, station: Station, tokens: torch.Tensor, piece: str) -> torch.Tensor:
        rows, columns = tokens.shape
        self._own += columns
        added = columns + (0 if self._cache.length else self._limits.prefix)
        ids = self._buffers.view(PREFILL_INPUTS, (rows, columns), _INT64)
        ids.copy_(tokens)
        mask = self._buffers.view(PREFILL_INPUTS, (rows, self._own), _INT64, aligned(rows * columns * _INT64.itemsize))
        mask.copy_(self._columns[: self._own] >= self._pads)
        logits_shape = (rows, 1 if self._last_only else columns, self._io.vocab)
        logits = self._buffers.view(piece, logits_shape, self._io.logits_dtype)
        station.set_shapes(self._shapes(rows, columns, self._own))
        station.bind(_addresses({INPUT_IDS: ids, ATTENTION_MASK: mask, LOGITS: logits}, fresh=False))
        station.bind(self._cache.addresses(added))
        station.enqueue()
        self._cache.turn(added)
        return logits

    def _shapes(self, rows: int, columns: int, own: int) -> dict[str, Shape]:
        shapes: dict[str, Shape] = {INPUT_IDS: (rows, columns), ATTENTION_MASK: (rows, own)}
        return shapes | {tensor.past: self._cache.past_shape() for tensor in self._io.cache}


def _addresses(tensors: Mapping[str, torch.Tensor], *, fresh: bool) -> dict[str, int]:
    """Return where tensors lie; of `fresh` only the length is read, but it needs an address too."""
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    return addresses | {FRESH: addresses[INPUT_IDS]} if fresh else addresses


def _gives_last_only(station: Station, shapes: Mapping[str, Shape]) -> bool:
    """Return whether a call with these shapes gives one row of logits per sequence, and not one per token."""
    station.set_shapes(shapes)
    return station.output_shape(LOGITS)[1] == 1
