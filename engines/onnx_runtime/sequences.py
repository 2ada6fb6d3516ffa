"""Sequences in progress in ONNX Runtime: a batch with its cache, fed call by call.

Tokens and lengths are the caller's own; the prefix is invisible.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.errors import EngineError
from spike_export.artifacts.manifest import Manifest
from spike_export.engines.onnx_runtime.cache_memory import CacheMemory, HostMemory, Provider, memory_of
from spike_export.engines.onnx_runtime.clipped_activations import CLIPPED, COUNT_CLIPPED, ClippedActivations
from spike_export.engines.onnx_runtime.denormals import denormals_flushed

COMPUTED = frozenset({"float32", "float16"})
"""Precisions that ONNX Runtime's CPU kernels compute in; it has no bfloat16 product."""

LOGITS_FROM = "logits_from"
"""Input [1] int64 of a graph that generates over a static cache: the first position with logits, -1 for the last."""

BUCKET = 128
"""Own tokens by which the buffers of a graph with free slots grow.

Equal steps b, not doublings: a token reads b / 2 empty slots on average, and pays for n / b slots of a copy where n are
held. That is least at b = sqrt(2 n c), if copying a slot costs c times reading it: 72 to 220 slots for n from 1,024 to
8,192 and c from 2.5 to 3.
"""

LOWERED_BUCKETS = 4
"""Such steps that the buffers of a lowered graph grow by at once: its attention reads the tokens that a row holds, so
that free slots cost no time, and they take no memory before something is written there."""


class Sequences(Protocol):
    """A batch of sequences and their cache.

    Attributes:
        lengths: [batch] int64; own tokens of each row in the cache.
    """

    lengths: NDArray[np.int64]

    def step(self, tokens: NDArray[np.int64], counts: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """Append tokens to the rows and return the logits [batch, sequence, vocab], or [batch, 1, vocab].

        The latter of a bundle that gives logits of the last token only: of each row's last one that counts.

        Args:
            tokens: [batch, sequence]; what stands behind a row's count is padding, and so are its logits.
            counts: [batch], 0..sequence: how many of a row's tokens count; all when omitted.

        Raises:
            EngineError: The tokens do not fit, or ONNX Runtime fails.
        """


@dataclass
class DynamicSequences:
    """Over a cache that grows: the outputs of a call are the next call's inputs, and are not copied in between.

    A cache has one length for all rows. Rows with fewer tokens than others are therefore padded on the left, which
    costs slots for good, and a sliding window counts slots: with one, only a first call may be ragged.
    """

    session: Any
    manifest: Manifest
    lengths: NDArray[np.int64]
    _mask: NDArray[np.int64]
    provider: Provider = "cpu"
    _cache: list[Any] = field(default_factory=list)

    @classmethod
    def begin(cls, session: Any, manifest: Manifest, batch: int, provider: Provider = "cpu") -> "DynamicSequences":
        """Return `batch` sequences without tokens."""
        return cls(session, manifest, np.zeros(batch, np.int64), np.zeros((batch, 0), np.int64), provider)

    def step(self, tokens: NDArray[np.int64], counts: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """See `Sequences`."""
        import onnxruntime as ort

        counts = _counts(tokens, counts, len(self.lengths))
        sequence = tokens.shape[1]
        pads = sequence - counts
        if self._mask.shape[1] and pads.any() and self.manifest.sliding_window is not None:
            raise EngineError(
                "rows of different lengths cannot continue together in a model with a sliding window; use "
                "--kv-cache static"
            )
        # Column j of a row padded on the left is its token j - pad; what wraps around is padding.
        columns = (np.arange(sequence) - pads[:, None]) % sequence
        mask = np.concatenate([self._mask, (np.arange(sequence) >= pads[:, None]).astype(np.int64)], axis=1)
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(np.take_along_axis(tokens, columns, axis=1)))
        binding.bind_cpu_input("attention_mask", mask)
        cache = self._cache or [
            ort.OrtValue.ortvalue_from_numpy(empty, self.provider) for empty in self._empty(len(tokens))
        ]
        binding.bind_output("logits", "cpu")
        for (past, present), value in zip(_cache_names(self.manifest), cache, strict=True):
            binding.bind_ortvalue_input(past, value)
            binding.bind_output(present, self.provider)
        run_bound(self.session, binding, sequence)
        logits, *self._cache = binding.get_outputs()
        self._mask, self.lengths = mask, self.lengths + counts
        given: NDArray[np.float32] = logits.numpy()
        if not pads.any() or given.shape[1] != sequence:  # all alike, or the last column's only
            return given
        back = (np.arange(sequence) + pads[:, None]) % sequence
        return np.take_along_axis(given, back[:, :, None], axis=1)

    def _empty(self, batch: int) -> list[NDArray[Any]]:
        shape = (batch, self.manifest.num_key_value_heads, 0, self.manifest.head_dim)
        return [np.zeros(shape, cache_type(self.manifest)) for _ in _cache_names(self.manifest)]


@dataclass
class StaticSequences:
    """Over buffers that this object owns and ONNX Runtime writes in place.

    Each row has a length of its own. A row is a sequence's place: `admit` gives it to a new one at any time. Rows begin
    together by the first `step`, or else each by `admit`; what a row says before that is of no use.

    The buffers have the bundle's capacity. Where the session's graph takes buffers of any length (`generation_graph`)
    they are only as long as the longest row needs, in steps of `BUCKET`, and are copied when that outgrows
    them; in longer steps where the graph is lowered.

    Attributes:
        buffers: Per layer key, value: [batch, kv_heads, slots, head_dim]; finite everywhere, because a slot that a
            query does not see is multiplied by zero.
        memory: What the buffers lie in.
        prefix: Buffer → [1, kv_heads, prefix, head_dim] of a lowered graph (`GenerationGraph`), which does not write
            the prefix, and takes several tokens of one row or one token of each; None of any other.
        verifies: Whether a call says how many positions get logits (`generation_graph`), so that `extend` gives those
            of several.
        clipped: Of a graph that counts clipped activations: where the counts go.
        single_row: Session that computes one token of one row, where it is not `session` that does.
    """

    session: Any
    manifest: Manifest
    lengths: NDArray[np.int64]
    buffers: list[Any]
    memory: CacheMemory = field(default_factory=HostMemory)
    prefix: Mapping[int, Any] | None = None
    verifies: bool = False
    clipped: ClippedActivations | None = None
    single_row: Any = None
    _last_logits: bool = False
    """Whether the graph gives logits of the last column only."""
    _writes_prefix: bool = False
    """Whether the graph itself writes the prefix of some layers."""
    _bindings: dict[tuple[int, int, bool], Any] = field(default_factory=dict)
    """First row, the one behind the last, and whether the session of single rows runs them → their binding."""
    _begun: bool = False

    @classmethod
    def begin(
        cls,
        session: Any,
        manifest: Manifest,
        batch: int,
        provider: Provider = "cpu",
        prefix: Mapping[str, NDArray[Any]] | None = None,
        clipped: ClippedActivations | None = None,
        single_row: Any = None,
    ) -> "StaticSequences":
        """Return `batch` sequences without tokens; `prefix` is a `GenerationGraph`'s, as is what `clipped` counts."""
        growing, capacity = not isinstance(_past_shape(session)[2], int), _capacity(manifest)
        own = min(_bucket(lowered=prefix is not None), capacity) if growing else capacity
        shape = (batch, manifest.num_key_value_heads, manifest.prefix_length + own, manifest.head_dim)
        names = [past for past, _ in _cache_names(manifest)]
        memory = memory_of(provider)
        buffers = [memory.zeros(shape, cache_type(manifest)) for _ in names]
        logits = next(value for value in session.get_outputs() if value.name == "logits")
        placed = None if prefix is None else {names.index(past): memory.placed(of) for past, of in prefix.items()}
        inputs = {value.name for value in session.get_inputs()}
        last, chooses = logits.shape[1] == 1 or LOGITS_FROM in inputs, LOGITS_FROM in inputs
        none = np.zeros(batch, np.int64)
        return cls(
            session, manifest, none, buffers, memory, placed, chooses, clipped, single_row, last, "fresh" in inputs
        )

    def step(self, tokens: NDArray[np.int64], counts: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """See `Sequences`. A row with count 0 keeps its length, but its buffer needs room for the padding.

        Rows are padded on the right here, so that a bundle with logits of the last token only takes no ragged call.
        """
        return self._step(tokens, _counts(tokens, counts, len(self.lengths)))

    def step_first(self, tokens: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.float32]:
        """As `step`, of the first rows alone: what stands in the others costs nothing.

        Args:
            tokens: [rows, sequence], of at most as many rows as there are.
            counts: [rows].
        """
        return self._step(tokens, _counts(tokens, counts, min(len(tokens), len(self.lengths))))

    def _step(self, tokens: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.float32]:
        rows = len(tokens)
        if self._last_logits and ((counts != tokens.shape[1]) & (counts > 0)).any():
            raise EngineError(
                "rows of different lengths in one call need all logits of a static cache: export with --logits all, or "
                "feed the rows one by one"
            )
        self._make_room(self.lengths[:rows], tokens.shape[1])
        together = rows if self.prefix is None or tokens.shape[1] == 1 else 1
        parts = [
            self._run(
                row,
                tokens[row : row + together],
                self.lengths[row : row + together],
                fresh=not self._begun,
                padded=not counts[row : row + together].all(),
            )
            for row in range(0, rows, together)
        ]
        self._begun = True
        self.lengths[:rows] += counts
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def admit(self, row: int, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Begin a new sequence [sequence] in a row, the others stand still; return its logits [1, sequence, vocab].

        Raises:
            EngineError: The tokens do not fit, or ONNX Runtime fails.
        """
        return self._run_row(row, tokens, fresh=True)

    def extend(self, row: int, tokens: NDArray[np.int64], positions: int = 1) -> NDArray[np.float32]:
        """Append tokens [sequence] to one row, the others stand still; return its logits [1, sequence, vocab].

        Args:
            row: The row.
            tokens: [sequence].
            positions: How many of the last tokens get logits, in a graph that asks for it; [1, positions, vocab] then.

        Raises:
            EngineError: The tokens do not fit, or ONNX Runtime fails.
        """
        return self._run_row(row, tokens, fresh=False, positions=positions)

    @property
    def capacity(self) -> int:
        """Most own tokens of a row."""
        return _capacity(self.manifest)

    def room(self, row: int) -> int:
        """Return how many tokens more a row takes."""
        return self.capacity - int(self.lengths[row])

    def forget(self, row: int, tokens: int) -> None:
        """Take back the last tokens of a row: what is fed next takes their places."""
        self.lengths[row] -= tokens

    def release(self, row: int) -> None:
        """Forget a row's tokens, so that it has room for padding again; the prefix stays."""
        self.lengths[row] = 0

    def clear(self, row: int) -> None:
        """Zero what the buffers hold of a row: a slot that a query does not see is multiplied by zero."""
        for buffer in self.buffers:
            buffer[row] = 0

    def move(self, source: int, target: int) -> None:
        """Put the sequence of one row into another one, whose own is lost; the source has none then."""
        held = self.manifest.prefix_length + int(self.lengths[source])
        for buffer in self.buffers:
            buffer[target, :, :held] = buffer[source, :, :held]
        self.lengths[target] = self.lengths[source]
        self.release(source)

    def saved(self, row: int, start: int, stop: int) -> NDArray[Any]:
        """Return a copy of keys and values of a row's own tokens `start` to `stop`; with those of the prefix from 0 on.

        Returns:
            [buffers, kv_heads, tokens, head_dim], in host memory.
        """
        prefix = self.manifest.prefix_length
        first = prefix + start if start else 0
        self.memory.synchronize()
        return np.stack([self.memory.on_host(buffer[row, :, first : prefix + stop]) for buffer in self.buffers])

    def restore(self, row: int, parts: Sequence[NDArray[Any]]) -> None:
        """Begin a new sequence in a row with what `saved` returned for its first tokens, part by part.

        Raises:
            EngineError: The tokens do not fit.
        """
        tokens = sum(part.shape[2] for part in parts) - self.manifest.prefix_length
        self._make_room(np.zeros(1, np.int64), tokens, first_row=row)
        place = 0
        for part in parts:
            end = place + part.shape[2]
            for buffer, values in zip(self.buffers, part, strict=True):
                buffer[row, :, place:end] = self.memory.placed(values)
            place = end
        self.memory.synchronize()
        self._begun = True
        self.lengths[row] = tokens

    def shrink(self) -> None:
        """Let the buffers be as long as the longest row needs, where they are longer by more than a bucket."""
        held = self.buffers[0].shape[2]
        slots = self._slots(int(self.lengths.max()) + 1)
        if self._growing and held > slots + _bucket(lowered=self.prefix is not None):
            self._resize(slots)

    def _run_row(self, row: int, tokens: NDArray[np.int64], *, fresh: bool, positions: int = 1) -> NDArray[np.float32]:
        _counts(tokens[None], None, 1)
        if not 0 <= row < len(self.lengths):
            raise EngineError(f"row {row} of a batch of {len(self.lengths)}: expected 0 to {len(self.lengths) - 1}")
        length = np.zeros(1, np.int64) if fresh else self.lengths[row : row + 1]
        self._make_room(length, len(tokens), first_row=row)
        logits = self._run(row, tokens[None], length, fresh=fresh, positions=positions)
        # From now on a fresh step would give all rows the prefix anew.
        self._begun = True
        self.lengths[row] = length[0] + len(tokens)
        return logits

    def _run(
        self,
        first: int,
        tokens: NDArray[np.int64],
        lengths: NDArray[np.int64],
        *,
        fresh: bool,
        positions: int = 1,
        padded: bool = False,
    ) -> NDArray[np.float32]:
        """Feed tokens [rows, sequence] to as many rows from the first one on; to some of them padding, maybe."""
        rows = slice(first, first + len(tokens))
        single = self.single_row is not None and tokens.size == 1
        session, binding = self.single_row if single else self.session, self._binding(rows, single=single)
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(tokens, np.int64))
        binding.bind_cpu_input("write_indices", lengths.copy())
        if self.verifies:
            binding.bind_cpu_input(LOGITS_FROM, np.array([-positions], np.int64))
        if self._writes_prefix:
            binding.bind_cpu_input("fresh", np.ones(int(fresh), np.bool_))
        if fresh and self.prefix is not None:
            for buffer, values in self.prefix.items():
                self.buffers[buffer][rows, :, : self.manifest.prefix_length] = values
        counts = self.clipped is not None and not padded and self.clipped.due()
        if self.clipped is not None:
            binding.bind_cpu_input(COUNT_CLIPPED, np.array([counts]))
        for output in self._outputs:
            binding.bind_output(output, "cpu")
        run_bound(session, binding, tokens.shape[1])
        # The buffers are outputs too, and need no objects of Python's for each call.
        outputs = binding.get_outputs_as_ortvaluevector()
        if self.clipped is not None and counts:
            self.clipped.add(outputs[1].numpy())
        logits: NDArray[np.float32] = outputs[0].numpy()
        return logits

    def _make_room(self, lengths: NDArray[np.int64], sequence: int, first_row: int = 0) -> None:
        """Let the buffers hold `sequence` more tokens of rows of these lengths.

        Raises:
            EngineError: The bundle's capacity ends before.
        """
        row = int(lengths.argmax())
        own = int(lengths[row]) + sequence
        if own > self.capacity:
            raise EngineError(
                f"row {first_row + row} has {lengths[row]} tokens and {sequence} more do not fit into the cache's "
                f"capacity of {self.capacity}; feed fewer, or export with a larger --capacity"
            )
        prefix = self.manifest.prefix_length
        if prefix + own > self.buffers[0].shape[2]:
            self._resize(self._slots(own))

    @property
    def _outputs(self) -> tuple[str, ...]:
        return ("logits",) if self.clipped is None else ("logits", CLIPPED)

    @property
    def _growing(self) -> bool:
        return not isinstance(_past_shape(self.session)[2], int)

    def _slots(self, own: int) -> int:
        """Return the length of buffers that hold so many own tokens of a row."""
        bucket = _bucket(lowered=self.prefix is not None)
        return self.manifest.prefix_length + min(self.capacity, -(-own // bucket) * bucket)

    def _resize(self, slots: int) -> None:
        """Give the buffers another length; of each row only what it holds is copied, and takes memory."""
        prefix, kept = self.manifest.prefix_length, min(slots, self.buffers[0].shape[2])
        held = [(row, min(kept, prefix + length)) for row, length in enumerate(self.lengths.tolist()) if length]
        for index, old in enumerate(self.buffers):  # one by one: never two whole caches in memory
            new = self.memory.zeros((*old.shape[:2], slots, old.shape[3]), cache_type(self.manifest))
            new[:, :, :prefix] = old[:, :, :prefix]
            for row, end in held:
                new[row, :, :end] = old[row, :, :end]
            self.buffers[index] = new
        self._bindings.clear()

    def _binding(self, rows: slice, *, single: bool = False) -> Any:
        """Return the binding of some rows; their part of a buffer lies in one piece."""
        key = (rows.start, rows.stop, single)
        if key not in self._bindings:
            self.memory.synchronize()
            buffers = [(buffer[rows].shape, self.memory.place(buffer[rows])) for buffer in self.buffers]
            session = self.single_row if single else self.session
            self._bindings[key] = _bound(session, self.manifest, self._outputs, buffers)
        return self._bindings[key]


def run_bound(session: Any, binding: Any, sequence: int) -> None:
    """Run a session over bound inputs and outputs.

    Raises:
        EngineError: ONNX Runtime fails; `sequence` is named.
    """
    try:
        with denormals_flushed():
            session.run_with_iobinding(binding)
    except Exception as error:  # ONNX Runtime's exceptions have no common type
        raise run_failure(error, sequence) from error


def run_failure(error: Exception, sequence: int) -> EngineError:
    """Return the error of a call with `sequence` tokens that ONNX Runtime did not finish."""
    return EngineError(f"ONNX Runtime fails on {sequence} tokens: {str(error).splitlines()[0]}")


def _bound(
    session: Any,
    manifest: Manifest,
    outputs: Sequence[str],
    buffers: Sequence[tuple[Sequence[int], tuple[str, int, int]]],
) -> Any:
    """Return a binding in which every buffer is both past and present; it does not keep the buffers alive.

    Args:
        session: What runs.
        manifest: Of the bundle.
        outputs: The other outputs.
        buffers: Shape and place (`CacheMemory`) of each.
    """
    binding = session.io_binding()
    for output in outputs:  # the first outputs, in this order, whatever is bound later
        binding.bind_output(output, "cpu")
    for (past, present), (shape, (*device, address)) in zip(_cache_names(manifest), buffers, strict=True):
        memory = (cache_type(manifest).type, list(shape), address)
        binding.bind_input(past, *device, *memory)
        binding.bind_output(present, *device, *memory)
    return binding


def _bucket(*, lowered: bool) -> int:
    return BUCKET * LOWERED_BUCKETS if lowered else BUCKET


def _capacity(manifest: Manifest) -> int:
    assert manifest.capacity is not None, "a static cache has a capacity"
    return manifest.capacity


def _past_shape(session: Any) -> list[int | str]:
    """Return the shape of a layer's cache as the graph declares it; a word stands for any length."""
    shape: list[int | str] = next(
        value.shape for value in session.get_inputs() if value.name.startswith("past_key_values.")
    )
    return shape


def _cache_names(manifest: Manifest) -> list[tuple[str, str]]:
    """Return the cache's (input, output) names, layer by layer, keys before values."""
    places = [f"{layer}.{kind}" for layer in range(manifest.num_hidden_layers) for kind in ("key", "value")]
    return [(f"past_key_values.{place}", f"present.{place}") for place in places]


def cache_type(manifest: Manifest) -> "np.dtype[Any]":
    """Return the type of the cache's elements."""
    return np.dtype(manifest.cache_type)


def _counts(tokens: NDArray[np.int64], counts: NDArray[np.int64] | None, batch: int) -> NDArray[np.int64]:
    """Return how many tokens of each row count.

    Raises:
        EngineError: Tokens or counts are not of this batch.
    """
    if tokens.ndim != 2 or len(tokens) != batch or not tokens.size:
        raise EngineError(f"tokens of shape {list(tokens.shape)} were given; expected [{batch}, 1 or more]")
    rows, sequence = tokens.shape
    if counts is None:
        return np.full(rows, sequence, np.int64)
    if counts.shape != (rows,) or counts.min() < 0 or counts.max() > sequence:
        raise EngineError(f"counts {counts.tolist()}: expected {rows} numbers from 0 to {sequence}")
    return counts.astype(np.int64)
