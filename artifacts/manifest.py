"""The bundle's manifest: what the graph is, where it came from, and how to call it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from spike_export.artifacts.errors import ArtifactError
from spike_export.artifacts.files.atomic_write import write_text
from spike_export.artifacts.files.documents import read_document, require_files
from spike_export.artifacts.files.json_document import first_fault
from spike_export.artifacts.files.sole_writer import finish_dead_replacement
from spike_export.artifacts.recipe import Dtype, KvCacheDtype

CacheKind = Literal["dynamic", "static"]

LogitsScope = Literal["all", "last"]
"""Of which tokens a graph gives logits: of every token, or of each row's last."""

MANIFEST_FILE = "manifest.json"
GRAPH_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"

INT8_WEIGHTS = "+int8-weights"
"""Behind a floating-point format: the product is in that format, the weight is stored in INT8 (W8A16)."""


LAST_TOKEN_NODE = "model.last_token.Slice"
"""The node of a last-token graph that drops all positions but the last; without it the graph gives all logits."""

CACHE_SLOTS = "cache.slots"
"""The initializer that lists the slots of a static cache: but for declared shapes, all that depends on their number."""


MOST_LAYERS = 10_000
"""Layers of the deepest decoder that is believed; the largest models have some hundred."""

Size = Annotated[int, Field(ge=1, le=2**31 - 1)]
"""Of an axis of a tensor."""


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
        mac_share: Their part of the multiply-accumulates that a token needs of all decoder linears, 0..1: an expert
            counts for the tokens that are routed to it on average. The head is not counted.
        per_token_share: The same of those whose quantized inputs have a scale per token.
    """

    modules: int
    mac_share: float
    per_token_share: float = 0.0


class HeadInfo(_Document):
    """The language-model head.

    Attributes:
        format: Its number format, as those of `linears`.
        mac_share: Its part of the multiply-accumulates of head and decoder linears together, for a token whose
            logits are computed, 0..1.
        weight_bytes: Of the weight and scales that only the head reads; 0 where it reads the embedding's.
    """

    format: str
    mac_share: float
    weight_bytes: int


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
        kv_cache: `dynamic` grows with every call; `static` is a buffer of the caller's, written in place.
        kv_cache_dtype: How the cache holds keys and values: in `dtype`, or in INT8.
        capacity: Tokens of its own a sequence may have in a static cache; None for a dynamic one.
        cache_slots: Length of a static cache's buffer: the prefix and the capacity.
        linears: Number format → the decoder linears that have it: `int8` or `fp8` (weights and inputs), a wider
            floating-point format such as `float16` (neither), or that format with `+int8-weights` (W8A16).
        engines: Which engines run the bundle, each with what restricts it.
        head: The language-model head; None in bundles of older versions, where it is in `dtype`.
        logits: Of which tokens the graph gives logits: of all, or of each row's last.
        max_position_embeddings: Tokens of its own a caller may use; the prefix is not counted.
        sliding_window: Slots a token sees, or None for all.
        files: Names of the bundle's other files; empty in bundles of older versions.
        unsupported: Runtime that cannot drive this graph → why, and what to do about it.
    """

    format: Literal[1] = 1
    model: SourceModel
    tools: Mapping[str, str]
    dtype: Dtype
    kv_cache: CacheKind = "dynamic"
    kv_cache_dtype: KvCacheDtype = "unquantized"
    capacity: int | None = Field(default=None, ge=1)
    cache_slots: int | None = None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    prefix: BundlePrefix | None
    linears: Mapping[str, LinearShare]
    head: HeadInfo | None = None
    logits: LogitsScope = "all"
    engines: tuple[str, ...] = ()
    vocab_size: Size
    hidden_size: Size
    num_hidden_layers: Annotated[int, Field(ge=1, le=MOST_LAYERS)]
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    max_position_embeddings: Size
    sliding_window: Size | None
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    files: tuple[str, ...] = ()
    unsupported: Mapping[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _require_whole_cache(self) -> Self:
        wanted = None if self.capacity is None else self.prefix_length + self.capacity
        if (self.kv_cache == "static") != (self.capacity is not None) or self.cache_slots != wanted:
            raise ValueError(
                f"kv_cache {self.kv_cache}, capacity {self.capacity} and {self.cache_slots} slots disagree"
            )
        return self

    @model_validator(mode="after")
    def _require_known_tokens(self) -> Self:
        fed = (
            *(self.prefix.token_ids if self.prefix else ()),
            *(() if self.bos_token_id is None else (self.bos_token_id,)),
        )
        unknown = next((token for token in fed if not 0 <= token < self.vocab_size), None)
        if unknown is not None:
            raise ValueError(f"token {unknown} is fed, and the model knows 0 to {self.vocab_size - 1}")
        if self.prefix and self.prefix.length != len(self.prefix.token_ids):
            raise ValueError(f"a prefix of {len(self.prefix.token_ids)} tokens has length {self.prefix.length}")
        return self

    @property
    def prefix_length(self) -> int:
        """Number of prefix tokens; 0 when there is no prefix."""
        return self.prefix.length if self.prefix else 0

    @property
    def cache_type(self) -> str:
        """Element type of the cache: `int8`, or a floating-point type."""
        return self.dtype if self.kv_cache_dtype == "unquantized" else self.kv_cache_dtype

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
    finish_dead_replacement(bundle)
    path = bundle / MANIFEST_FILE
    if bundle.is_dir():
        require_files(bundle.iterdir(), ArtifactError)
    try:
        text = read_document(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ArtifactError(f"{path}: cannot read the manifest ({reason}); is {bundle} a bundle?") from error
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        raise ArtifactError(f"{path}: {first_fault(error)}; export the bundle again") from error
