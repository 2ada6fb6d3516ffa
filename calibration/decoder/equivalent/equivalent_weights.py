"""The checkpoint of an equivalent model: rotated and smoothed weights, made from the stored ones as they are read.

The unquantized function is unchanged. With x a row of the residual stream, g a norm's gain, R the rotation, s the
scales of an input and H a Hadamard transform (its own inverse), which some inputs pass at run time and which the values
pass through attention, because attention sums each channel over the tokens:
    embedding E -> E R;   o_proj, down_proj (write the stream): W -> R^T W, b -> R^T b
    readers of a norm: W -> W diag(g) R, and the norm's gain -> 1   (with a rotation)
    readers of a smoothed input: W -> W diag(s);   its norm: g -> g / s;   its producing rows: W -> diag(1 / s) W
    readers of an input behind a Hadamard transform: W -> W diag(s) H
    rotated value heads: o_proj W -> W diag(s) H, v_proj's rows W -> H diag(1 / s) W, b -> H diag(1 / s) b
    head H -> H diag(g of the final norm) R, no longer tied to the embedding
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.errors import RecipeError
from spike_export.artifacts.recipe import HadamardPlan, RotationPlan, SmoothingPlan
from spike_export.calibration.decoder.equivalent.hadamard import transform_columns, transform_rows
from spike_export.calibration.decoder.equivalent.rotation import rotation_matrix
from spike_export.calibration.decoder.equivalent.smoothing import is_per_value_head, plan_scales, repeated_for_group
from spike_export.checkpoint.checkpoint import EMBEDDING, LM_HEAD, Checkpoint
from spike_export.checkpoint.decoder_config import DecoderConfig, linear_shapes
from spike_export.checkpoint.modules import (
    InputSite,
    block_inputs,
    input_sites,
    is_down_projection,
    is_output_projection,
    split_name,
)
from spike_export.checkpoint.row_blocks import BlockReader, array_reader

Floats = NDArray[np.float32]

FINAL_NORM = "model.norm"


def rotation_obstacle(config: DecoderConfig) -> str | None:
    """Return why the residual stream of this family cannot be rotated, or None where it can."""
    if config.family.post_norms:
        return "norms behind attention and the feed-forward block have gains that no linear can absorb"
    return None


class Transforms(Protocol):
    """What makes the equivalent model: a recipe, or another value that holds these parts of one."""

    @property
    def rotation(self) -> RotationPlan | None:
        """Of the residual stream."""

    @property
    def smoothing(self) -> Mapping[str, SmoothingPlan]:
        """Representative → scales of its input's channels."""

    @property
    def hadamard(self) -> HadamardPlan | None:
        """Of what `down_proj` reads, at run time."""

    @property
    def value_rotation(self) -> Mapping[str, int]:
        """`o_proj` → channels of a block of the rotation of its value heads."""

    @property
    def input_hadamard(self) -> Mapping[str, int]:
        """Representative → channels of a block of the Hadamard transform of a block's input, at run time."""


def transformed_checkpoint(checkpoint: Checkpoint, transforms: Transforms) -> Checkpoint:
    """Return the model whose weights are quantized, for instance by a recipe.

    Raises:
        RecipeError: A transformation does not fit the model.
    """
    return equivalent_checkpoint(
        checkpoint,
        transforms.rotation,
        transforms.smoothing,
        transforms.hadamard,
        transforms.value_rotation,
        transforms.input_hadamard,
    )


def equivalent_checkpoint(
    checkpoint: Checkpoint,
    rotation: RotationPlan | None,
    smoothing: Mapping[str, SmoothingPlan],
    hadamard: HadamardPlan | None = None,
    value_rotation: Mapping[str, int] = MappingProxyType({}),
    input_hadamard: Mapping[str, int] = MappingProxyType({}),
) -> Checkpoint:
    """Return the rotated and smoothed model; the checkpoint itself where there is nothing to do.

    Its tensors' hash stays the stored files', to which recipes refer.

    Raises:
        RecipeError: The family cannot be rotated, or a smoothing plan, a Hadamard transform or the rotation of the
            value heads does not fit the model.
    """
    if not (rotation or smoothing or hadamard or value_rotation or input_hadamard):
        return checkpoint
    config = checkpoint.config
    obstacle = rotation_obstacle(config) if rotation else None
    if obstacle:
        raise RecipeError(f"rotation: {config.family.model_type} cannot be rotated: {obstacle}; remove it")
    matrix = _matrix(rotation, config.hidden_size) if rotation else None
    block = None if hadamard is None else fitting_block(hadamard, config)
    require_value_blocks(value_rotation, config)
    require_input_blocks(input_hadamard, config)
    scales = stored_scales(config, smoothing)
    tensors = EquivalentTensors(checkpoint, matrix, scales, block, value_rotation, input_hadamard)
    config = replace(config, hadamard_block=block, input_hadamard=dict(input_hadamard))
    if rotation and config.tie_word_embeddings:
        config = replace(config, tie_word_embeddings=False, hf={**config.hf, "tie_word_embeddings": False})
    return replace(checkpoint, config=config, tensors=tensors)


def fitting_block(plan: HadamardPlan, config: DecoderConfig) -> int:
    """Return the channels of a block.

    Raises:
        RecipeError: Blocks of this size do not fill what `down_proj` reads.
    """
    if config.inner_size % plan.block:
        raise RecipeError(
            f"hadamard: block {plan.block} does not divide the {config.inner_size} channels that down_proj reads; "
            "give another power of two, or remove it"
        )
    return plan.block


def require_value_blocks(value_rotation: Mapping[str, int], config: DecoderConfig) -> None:
    """Refuse rotations of value heads, `o_proj` → channels of a block, that do not fit a model.

    Raises:
        RecipeError: Blocks of this size do not fill a head, or an input is not attention's output.
    """
    outputs = {site.representative for site in input_sites(config) if is_per_value_head(site)}
    for name, block in value_rotation.items():
        layer, inner = split_name(name)
        if inner not in outputs or not 0 <= layer < config.num_hidden_layers:
            raise RecipeError(f"value_rotation of {name}: no o_proj of this decoder has that name; remove the entry")
        if config.head_dim % block:
            raise RecipeError(
                f"value_rotation of {name}: block {block} does not divide the {config.head_dim} channels of a head; "
                "give another power of two, or remove the entry"
            )


def require_input_blocks(input_hadamard: Mapping[str, int], config: DecoderConfig) -> None:
    """Refuse Hadamard transforms of blocks' inputs, representative → channels of a block, that do not fit a model.

    Raises:
        RecipeError: Blocks of this size do not fill the residual stream, or no block of a layer reads such an input.
    """
    inputs = block_inputs(config)
    for name, block in input_hadamard.items():
        layer, inner = split_name(name)
        if inner not in inputs or not 0 <= layer < config.num_hidden_layers:
            raise RecipeError(
                f"input_hadamard of {name}: no block of this decoder reads such an input; remove the entry"
            )
        if config.hidden_size % block:
            raise RecipeError(
                f"input_hadamard of {name}: block {block} does not divide the {config.hidden_size} channels of the "
                "residual stream; give another power of two, or remove the entry"
            )


def _matrix(rotation: RotationPlan, width: int) -> Floats:
    try:
        return rotation_matrix(rotation, width).astype(np.float32)
    except ValueError as error:
        raise RecipeError(f"rotation: {error}; use kind orthogonal") from error


def stored_scales(config: DecoderConfig, smoothing: Mapping[str, SmoothingPlan]) -> dict[str, Floats]:
    """Return the scales of every smoothed input by representative module, one per stored channel.

    Raises:
        RecipeError: A plan does not fit the model.
    """
    sites = {site.representative: site for site in input_sites(config)}
    found = {}
    for name, plan in smoothing.items():
        try:
            layer, inner = split_name(name)
            scales = plan_scales(plan)
        except ValueError as error:
            raise RecipeError(f"smoothing of {name}: {error}; calibrate again") from error
        site = sites.get(inner)
        if site is None or not 0 <= layer < config.num_hidden_layers:
            raise RecipeError(f"smoothing of {name}: no input of this decoder has that name; remove the entry")
        if site.producer is None:
            raise RecipeError(f"smoothing of {name}: no norm can absorb the scales of this input; remove the entry")
        expected = _width(config, site)
        if len(scales) != expected:
            raise RecipeError(f"smoothing of {name}: {len(scales)} scales for {expected} channels; calibrate again")
        found[name] = scales
    _require_one_scaling_per_producer(config, found)
    return found


def _require_one_scaling_per_producer(config: DecoderConfig, scales: Mapping[str, Floats]) -> None:
    """Refuse different scales of one norm's output, which a router and its experts read as inputs of their own."""
    producers = {site.representative: site.producer for site in input_sites(config)}
    first: dict[tuple[int, str | None], str] = {}
    for name in scales:
        layer, inner = split_name(name)
        known = first.setdefault((layer, producers[inner]), name)
        if not np.array_equal(scales[known], scales[name]):
            raise RecipeError(f"smoothing of {name}: {known} reads the same tensor and has other scales; remove one")


def _width(config: DecoderConfig, site: InputSite) -> int:
    """Return the number of scales of a site: its channels, or the value heads' for attention's output."""
    if is_per_value_head(site):
        return config.num_key_value_heads * config.head_dim
    return linear_shapes(config)[site.representative][1]


@dataclass(frozen=True)
class EquivalentTensors:
    """A `TensorSource` that folds rotation and scales into what it reads.

    Attributes:
        original: Where the stored tensors come from.
        rotation: [hidden, hidden] float32, or None.
        scales: Representative module → scales [channels] (for `o_proj`: of the value heads).
        hadamard: Channels of a block of the Hadamard transform in front of `down_proj`; None without one.
        values: `o_proj` → channels of a block of the rotation of the value heads in front of it.
        inputs: Input of a block, by its representative → channels of a block of the Hadamard transform in front of it.
    """

    original: Checkpoint
    rotation: Floats | None
    scales: Mapping[str, Floats]
    hadamard: int | None = None
    values: Mapping[str, int] = field(default_factory=dict)
    inputs: Mapping[str, int] = field(default_factory=dict)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """HF tensor name → shape."""
        shapes = dict(self.original.tensors.shapes)
        if self.rotation is not None:
            shapes.setdefault(LM_HEAD, shapes.get(EMBEDDING, ()))
            shapes.setdefault(EMBEDDING, shapes[LM_HEAD])
        return shapes

    def sha256(self) -> str:
        """Hash of the stored weight files."""
        return self.original.tensors.sha256()

    def read(self, name: str) -> Floats:
        """Read one tensor and fold into it what concerns it."""
        tensor = self.original.tensor(name)
        if not name.startswith("model.layers."):
            return self._outer(name, tensor)
        layer, rest = split_name(name)
        module, _, kind = rest.rpartition(".")
        if module in self._norms:
            return self._norm(layer, module, tensor)
        if module in self._readers:
            return self._linear(layer, module, kind, tensor)
        return tensor

    def read_rows(self, name: str, rows: NDArray[np.int64]) -> Floats:
        """Read these rows: outside the layers scales change nothing, and an embedding's other rows stay unread."""
        if self.rotation is None and not name.startswith("model.layers."):
            return self.original.rows(name, rows)
        return self.read(name)[rows]

    def _outer(self, name: str, tensor: Floats) -> Floats:
        if self.rotation is None:
            return tensor
        if name == EMBEDDING:
            return _product(tensor, self.rotation)
        if name == LM_HEAD:
            return _product(tensor * self._gain(FINAL_NORM), self.rotation)
        return np.full_like(tensor, 1.0 - self._offset)  # the final norm: its gain went into the head

    @property
    def _offset(self) -> float:
        return self.original.config.family.norm_offset

    def _gain(self, norm: str) -> Floats:
        return np.asarray(self.original.tensor(f"{norm}.weight") + np.float32(self._offset), np.float32)

    @cached_property
    def _readers(self) -> Mapping[str, InputSite]:
        return {reader: site for site in input_sites(self.original.config) for reader in site.readers}

    @cached_property
    def _norms(self) -> frozenset[str]:
        return frozenset(str(site.producer) for site in input_sites(self.original.config) if site.behind_norm)

    @cached_property
    def _producers(self) -> Mapping[str, InputSite]:
        return {str(site.producer): site for site in input_sites(self.original.config) if site.behind_linear}

    def _norm_scales(self, layer: int, norm: str) -> Floats | None:
        """Return the scales of a norm's output, given under any of the sites that read it."""
        for site in input_sites(self.original.config):
            if site.producer == norm:
                scales = self.scales.get(f"model.layers.{layer}.{site.representative}")
                if scales is not None:
                    return scales
        return None

    def _norm(self, layer: int, norm: str, tensor: Floats) -> Floats:
        scales = self._norm_scales(layer, norm)
        gain = np.ones_like(tensor) if self.rotation is not None else tensor + np.float32(self._offset)
        if scales is None and self.rotation is None:
            return tensor
        return np.asarray((gain if scales is None else gain / scales) - np.float32(self._offset), np.float32)

    def _linear(self, layer: int, module: str, kind: str, tensor: Floats) -> Floats:
        site = self._readers[module]
        if self.rotation is not None and kind == "weight" and site.behind_norm:
            tensor = _product(tensor * self._gain(f"model.layers.{layer}.{site.producer}"), self.rotation)
        scaling = self._scaling(layer, module, kind, len(tensor))
        if scaling is not None:
            tensor = tensor.copy()
            scaling.apply(slice(0, len(tensor)), tensor)
        if self.rotation is not None and _writes_stream(module):
            tensor = _product(self.rotation.T, tensor)
        return tensor

    def _scaling(self, layer: int, module: str, kind: str, height: int) -> "_Scaling | None":
        """Return how a linear's tensor of so many rows changes without the rotation; None where it does not."""
        produced = self._producers.get(module)
        columns = self._column_scales(layer, self._readers[module]) if kind == "weight" else None
        column_block = self._column_block(layer, module)
        rows, row_block = None, None
        if produced is not None:
            read_by = f"model.layers.{layer}.{produced.representative}"
            rows, row_block = self.scales.get(read_by), self.values.get(read_by)
            if row_block is not None and rows is None:
                rows = np.ones(_width(self.original.config, produced), np.float32)
        scaling = _Scaling(columns, rows, height, column_block if kind == "weight" else None, row_block)
        return scaling if scaling.changes else None

    def _column_block(self, layer: int, module: str) -> int | None:
        """Return the channels of a block of the Hadamard transform that a linear's columns take up."""
        if is_down_projection(module):
            return self.hadamard
        return ({**self.values, **self.inputs}).get(f"model.layers.{layer}.{self._readers[module].representative}")

    def _column_scales(self, layer: int, site: InputSite) -> Floats | None:
        if site.behind_norm:
            return self._norm_scales(layer, str(site.producer))
        scales = self.scales.get(f"model.layers.{layer}.{site.representative}")
        if scales is None or not is_per_value_head(site):
            return scales
        return repeated_for_group(scales, self.original.config)

    @contextmanager
    def block_reader(self, name: str) -> Iterator[BlockReader]:
        """Open a tensor: scales are folded into rows as they are read; with a rotation all is read here, once."""
        layer, rest = split_name(name) if name.startswith("model.layers.") else (0, "")
        module, _, kind = rest.rpartition(".")
        if self.rotation is not None or module in self._norms:
            yield array_reader(self.read(name))
            return
        scaling = None
        if module in self._readers:
            scaling = self._scaling(layer, module, kind, self.original.stored_shape(name)[0])
        if scaling is not None and scaling.row_block is not None:
            yield array_reader(self.read(name))  # rows of a block are mixed with one another
            return
        with self.original.block_reader(name) as read:
            yield read if scaling is None else scaling.reader(read)


@dataclass(frozen=True)
class _Scaling:
    """How scales and Hadamard transforms change a linear's tensor.

    Attributes:
        columns: What its columns are multiplied with, or None.
        rows: What its last rows are divided by, or None. Fused projections produce with their last rows: v of q, k, v,
            and up of gate, up.
        height: How many rows the tensor has.
        column_block: Channels of a block of the Hadamard transform that its columns take up, or None.
        row_block: Rows of a block of the transform that its last rows pass behind `rows`, or None.
    """

    columns: Floats | None
    rows: Floats | None
    height: int
    column_block: int | None
    row_block: int | None

    @property
    def changes(self) -> bool:
        """Whether anything is done."""
        return self.columns is not None or self.rows is not None or self.column_block is not None

    def apply(self, rows: slice, values: Floats) -> None:
        """Change these rows of the tensor, in place; all of them where rows are mixed."""
        if self.columns is not None:
            values *= self.columns
        if self.column_block is not None:
            transform_columns(values, self.column_block)
        if self.rows is not None:
            first = self.height - len(self.rows)
            start = max(rows.start, first)
            if start < rows.stop:
                divisors = self.rows[start - first : rows.stop - first]
                values[start - rows.start :] /= divisors.reshape(-1, *[1] * (values.ndim - 1))
            if self.row_block is not None:
                transform_rows(values[first:], self.row_block)

    def reader(self, read: BlockReader) -> BlockReader:
        """Return what reads the changed rows, rounded once, to the precision that is asked for."""

        def scaled(rows: slice, out: NDArray[Any]) -> None:
            values = out if out.dtype == np.float32 else np.empty(out.shape, np.float32)
            read(rows, values)
            self.apply(rows, values)
            if values is not out:
                out[...] = values

        return scaled


def _writes_stream(module: str) -> bool:
    return is_output_projection(module) or is_down_projection(module)


def _product(left: Any, right: Any) -> Floats:
    return np.asarray(np.matmul(left, right), np.float32)
