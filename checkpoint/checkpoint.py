"""One view of a model, whatever file it comes from: configuration, tokenizer, and tensors read when asked for."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.errors import CheckpointError
from spike_export.checkpoint.decoder_config import DecoderConfig, layer_shapes, tensor_shapes
from spike_export.checkpoint.row_blocks import BlockReader, array_reader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"

_NAMED = 1 << 17
"""Tensors of which the first that is missing is named; of more than that, only how many are needed is said."""


class TensorSource(Protocol):
    """Where tensors come from. Shapes cost nothing; a tensor is read, and decoded, each time it is asked for."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """HF tensor name → shape."""

    def read(self, name: str) -> NDArray[np.float32]:
        """Read one tensor as float32 (exact for float16 and bfloat16; dequantized for GGUF's block formats)."""

    def sha256(self) -> str:
        """Hash of the weight files' content, in hexadecimal."""


@runtime_checkable
class RowSource(Protocol):
    """A `TensorSource` that can also read some rows of a tensor without the others."""

    def read_rows(self, name: str, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read these rows, in this order, as float32: the same values as in the whole tensor."""


@runtime_checkable
class BlockSource(Protocol):
    """A `TensorSource` that reads rows that follow one another into memory of the caller's."""

    def block_reader(self, name: str) -> AbstractContextManager[BlockReader]:
        """Open a tensor; what is read is float32, float16 or bfloat16, and the values are those of the whole tensor."""


@runtime_checkable
class WatchedSource(Protocol):
    """A `TensorSource` over files, which somebody may replace while they are in use."""

    def require_unchanged(self) -> None:
        """Refuse files that are not those of `sha256` any more."""


@dataclass(frozen=True)
class Checkpoint:
    """A model to calibrate and export.

    Attributes:
        name: Short name of the source (no path), for reports.
        config: The decoder.
        tensors: The weights.
        tokenizer: transformers' fast tokenizer, or None when the checkpoint has none.
        generation_config: Content of `generation_config.json`; may be empty.
    """

    name: str
    config: DecoderConfig
    tensors: TensorSource
    tokenizer: "PreTrainedTokenizerBase | None"
    generation_config: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Refuse a beginning-of-sequence id that the embedding has no row for.

        Raises:
            CheckpointError: Names the id.
        """
        bos = self.bos_token_id
        if bos is not None and not 0 <= bos < self.config.vocab_size:
            raise CheckpointError(
                f"{self.name}: sequences begin with token {bos}, and the model knows 0 to "
                f"{self.config.vocab_size - 1}; correct bos_token_id, or the tokenizer"
            )

    def tensor(self, name: str) -> NDArray[np.float32]:
        """Read one tensor by HF name; the tied head and embedding stand in for each other."""
        return self.tensors.read(self._stored_name(name))

    def rows(self, name: str, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read these rows of a tensor; where the source can, memory holds no others."""
        name = self._stored_name(name)
        if isinstance(self.tensors, RowSource):
            return self.tensors.read_rows(name, rows)
        return self.tensors.read(name)[rows]

    @contextmanager
    def block_reader(self, name: str) -> Iterator[BlockReader]:
        """Yield what reads rows that follow one another; where the source cannot, the whole is read here, once."""
        name, source = self._stored_name(name), self.tensors
        if isinstance(source, BlockSource):
            with source.block_reader(name) as read:
                yield read
            return
        if isinstance(source, RowSource):

            def read_rows(rows: slice, out: NDArray[Any]) -> None:
                out[...] = source.read_rows(name, np.arange(rows.start, rows.stop))

            yield read_rows
            return
        yield array_reader(source.read(name))

    def require_unchanged(self) -> None:
        """See that the weights come from the files that were hashed: what was read of others must not be kept.

        Raises:
            CheckpointError: A file has changed.
        """
        if isinstance(self.tensors, WatchedSource):
            self.tensors.require_unchanged()

    def stored_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the tensor that `tensor` would read."""
        return self.tensors.shapes[self._stored_name(name)]

    def _stored_name(self, name: str) -> str:
        if name not in self.tensors.shapes and self.config.tie_word_embeddings and name in (LM_HEAD, EMBEDDING):
            return EMBEDDING if name == LM_HEAD else LM_HEAD
        return name

    @property
    def bos_token_id(self) -> int | None:
        """The beginning-of-sequence id: the tokenizer's, else the configuration's, else the EOS id.

        Source: method, "b = BOS id; if the model has none, its EOS id".
        """
        candidates = (
            getattr(self.tokenizer, "bos_token_id", None),
            self.config.bos_token_id,
            getattr(self.tokenizer, "eos_token_id", None),
            *self.config.eos_token_ids,
        )
        return next((token for token in candidates if token is not None), None)


def validate_shapes(config: DecoderConfig, source: TensorSource, place: str) -> None:
    """Refuse a checkpoint that lacks a tensor of the decoder or holds one of another shape.

    Raises:
        CheckpointError: Names the first such tensor, and how many there are.
    """
    found = source.shapes
    needed = config.num_hidden_layers * len(layer_shapes(config))
    if needed > max(len(found), _NAMED):
        raise CheckpointError(
            f"{place}: {len(found)} tensors are there, and the configuration's {config.num_hidden_layers} layers need "
            f"{needed}; the checkpoint is incomplete or of another model"
        )
    tied = config.tie_word_embeddings and LM_HEAD in found
    faults = []
    for name, shape in tensor_shapes(config).items():
        actual = found.get(LM_HEAD if tied and name == EMBEDDING and name not in found else name)
        if actual is None:
            faults.append(f"tensor {name} is missing")
        elif tuple(actual) != shape:
            faults.append(f"tensor {name} has shape {list(actual)}, the configuration says {list(shape)}")
    if faults:
        more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
        raise CheckpointError(f"{place}: {faults[0]}{more}; the checkpoint is incomplete or of another model")
