"""The bundle's manifest: what the graph is, where it came from, and how to call it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from spike_export.calibration.atomic_write import write_text
from spike_export.calibration.errors import ArtifactError
from spike_export.calibration.recipe import Dtype

MANIFEST_FILE = "manifest.json"
GRAPH_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"

INT8_WEIGHTS = "+int8-weights"
"""Behind a floating-point format: the product is in that format, the weight is stored in INT8 (W8A16)."""


class _Document(BaseModel):
    """A part of the manifest: immutable, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SourceModel(_Document):
    """Which checkpoint and recipe the bundle was made of.

    Attributes:
        checkpoint_sha256: Hash of the weight files.
        recipe_sha256: Hash of the recipe as `save_recipe` writes it; None when nothing was quantized.
    """

    source: str
    architecture: str
    checkpoint_sha256: str
    recipe_sha256: str | None


class BundlePrefix(_Document):
    """The prefix whose key/values the graph holds.

    Attributes:
        length: Number of tokens, P.
        holds_bos: Whether the caller must not put a BOS before its text, because the prefix has it.
        in_cache: Whether the cache holds it, longer by P slots than the caller's own tokens; else the graph puts it
            before the cache in every call.
    """

    token_ids: tuple[int, ...] = Field(min_length=1)
    text: str
    length: int
    holds_bos: bool
    in_cache: bool = True


class LinearShare(_Document):
    """The decoder linears of one number format.

    Attributes:
        modules: How many there are.
        mac_share: Their part of the multiply-accumulates of all decoder linears, 0..1; the head is not counted.
    """

    modules: int
    mac_share: float


class TensorInfo(_Document):
    """A graph input or output; a string in `shape` is a symbolic dimension."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class Manifest(_Document):
    """What `manifest.json` holds.

    Attributes:
        tools: Package → version that wrote the bundle.
        dtype: Precision of the embeddings, residual stream, attention, cache and head.
        linears: Number format → the decoder linears that have it: `int8` (weights and inputs), a floating-point
            format such as `float16` (neither), or that format with `+int8-weights` (W8A16).
        max_position_embeddings: Tokens of its own a caller may use; the prefix is not counted.
        sliding_window: Slots a token sees, or None for all.
        unsupported: Runtime that cannot drive this graph → why, and what to do about it.
    """

    format: Literal[1] = 1
    model: SourceModel
    tools: Mapping[str, str]
    dtype: Dtype
    kv_cache: Literal["dynamic", "static"] = "dynamic"
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    prefix: BundlePrefix | None
    linears: Mapping[str, LinearShare]
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    sliding_window: int | None
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    unsupported: Mapping[str, str] = Field(default_factory=dict)

    @property
    def prefix_length(self) -> int:
        """Number of prefix tokens; 0 when there is no prefix."""
        return self.prefix.length if self.prefix else 0

    @property
    def cached_prefix_length(self) -> int:
        """Slots by which the cache is longer than the caller's own tokens."""
        return self.prefix.length if self.prefix and self.prefix.in_cache else 0


def save_manifest(manifest: Manifest, bundle: Path) -> None:
    """Write `manifest.json` into the bundle's folder.

    Raises:
        ArtifactError: The file cannot be written.
    """
    text = json.dumps(manifest.model_dump(mode="json"), indent=1, ensure_ascii=False)
    write_text(bundle / MANIFEST_FILE, text + "\n")


def load_manifest(bundle: Path) -> Manifest:
    """Read and validate a bundle's manifest.

    Raises:
        ArtifactError: The file is missing or not a manifest; the first fault is named.
    """
    path = bundle / MANIFEST_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ArtifactError(f"{path}: cannot read the manifest ({reason}); is {bundle} a bundle?") from error
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"]) or "the document"
        raise ArtifactError(f"{path}: {where}: {fault['msg']}; export the bundle again") from error
