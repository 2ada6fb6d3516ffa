"""The recipe: the one document that calibration hands to export. Readable, versioned, editable by hand."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from spike_export.artifacts.errors import RecipeError
from spike_export.artifacts.files.atomic_write import write_text
from spike_export.artifacts.files.documents import read_document
from spike_export.artifacts.files.json_document import first_fault

Dtype = Literal["float32", "float16", "bfloat16"]
"""Precision of whatever is not quantized."""

WeightScheme = Literal["int8-per-channel", "int8-per-tensor"]

ActivationKind = Literal["static", "per-token"]
"""How a quantized linear's input is scaled: by a constant, or at run time by each token's own largest magnitude."""

ExcludedWeights = Literal["unquantized", "int8"]
"""How the modules that QFeM excludes hold their weights: in the unquantized precision, or in INT8 (W8A16)."""

AttentionProducts = Literal["unquantized", "int8-per-tensor-static"]
"""Operands of attention's two matrix products (Q, K and V after rope)."""

KvCacheDtype = Literal["unquantized", "int8"]
"""How the cache holds keys and values: in the unquantized precision, or in INT8 with a step per channel."""

HeadScheme = Literal["unquantized", "int8-weights", "int8-per-token-dynamic"]
"""How the language-model head computes: as it is; from INT8 weights alone; or from INT8 weights and tokens that are
quantized by their own largest magnitude at run time. Neither needs calibration."""

HEAD_WEIGHTS: WeightScheme = "int8-per-channel"
"""Scales of the head's INT8 weights: one per row of the vocabulary."""

SMOOTHED_HEAD: HeadScheme = "int8-per-token-dynamic"
"""The head whose input is smoothed: the only one that rounds a whole token with one scale."""

ActivationRange = Literal["max", "sample-mean", "percentile", "mse"]
"""What a static activation scale covers: the largest magnitude of all samples; the mean over the samples of each
sample's largest (averaged min-max), which clips the rare spike that only a few samples have, with a margin for other
kinds of text where smoothing is searched; the 99.9th percentile of the tokens' largest; or the share of the largest
that makes the least error on held-out windows."""

UNREACHED = "no token was sent here in calibration"
"""Reason of an expert that is kept because nothing is known of its input."""


def _held_by_float32(value: float) -> float:
    if not 2.0**-126 <= value <= (2 - 2.0**-23) * 2.0**127:
        raise ValueError("float32 does not hold this number")
    return value


PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False), AfterValidator(_held_by_float32)]
"""A scale or a magnitude that float32, in which the graph holds scales, has as a normal number."""

ModuleName = Annotated[str, Field(pattern=r"^model\.layers\.[0-9]{1,6}\.[A-Za-z0-9_.]+$")]
"""HF's name of a part of a decoder layer, such as `model.layers.11.mlp.down_proj`."""


def _a_power_of_two(block: int) -> int:
    if block & (block - 1):
        raise ValueError(f"block is {block}; expected a power of two such as 64")
    return block


HadamardBlock = Annotated[int, Field(gt=1, le=4096), AfterValidator(_a_power_of_two)]
"""Channels that a Hadamard transform mixes with one another; a block divides the channels of its input."""

Criterion = Literal["ratio", "noise"]
"""What decides which modules stay in 16 bit: the max-median ratio, as in the paper, or the estimated noise."""

WindowKind = Literal["packed", "documents"]
"""`packed`: cut from the stream of all documents, one after another; `documents`: each inside one document."""

NumberFormat = Literal["int8", "fp8"]
"""Of quantized operands: 8-bit integers, or floats of 4 exponent and 3 mantissa bits (E4M3)."""

QMAX = 127
"""Largest quantized magnitude; symmetric, so that a scale is amax / 127."""

SMALLEST_AMAX = 1e-5
"""Stands in for the largest magnitude of a tensor that is all zeros, so that its scale can be divided by."""

LARGEST: Mapping[NumberFormat, int] = {"int8": QMAX, "fp8": 448}
"""Number format → the magnitude that a scale maps the covered range's end to."""


class _Document(BaseModel):
    """A part of the recipe: immutable, and unknown keys are refused (a typo must not be ignored)."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSource(_Document):
    """Which checkpoint the recipe belongs to."""

    source: str
    architecture: str
    sha256: str


class CorpusPart(_Document):
    """One of several corpora, and how many of the calibration windows were cut from it."""

    name: str
    sha256: str
    samples: int


class CorpusSource(_Document):
    """Which tokens it was measured on.

    Attributes:
        parts: The corpora, where they were several; name and hash are then those of all together.
    """

    name: str
    sha256: str
    samples: int
    length: int
    seed: int
    windows: WindowKind = "packed"
    parts: tuple[CorpusPart, ...] = ()


class Scheme(_Document):
    """Number formats of the quantized linears and of all else; how an input is scaled is a module's own matter."""

    weights: WeightScheme = "int8-per-channel"
    activation_range: ActivationRange = "max"
    excluded_weights: ExcludedWeights = "unquantized"
    attention: AttentionProducts = "unquantized"
    head: HeadScheme = "unquantized"
    unquantized: Dtype = "float16"
    unquantized_reason: str | None = None


class Prefix(_Document):
    """QFeP: token ids whose key/value cache stands before every sequence.

    Attributes:
        ratio: The worst max-median ratio of any module once the prefix is in place.
        notes: What a caller of the model has to know, e.g. that a chat template emits BOS a second time.
    """

    token_ids: tuple[int, ...] = Field(min_length=1)
    text: str
    ratio: float
    notes: tuple[str, ...] = ()


class ModulePlan(_Document):
    """What becomes of one linear module.

    Attributes:
        precision: `int8`, or the format that is kept.
        activations: How the input of a quantized module is scaled, `static` by default.
        activation_scale: Static scale of the input (range / 127, for fp8 range / 448). A module whose tokens have each
            their own may have one too, which takes effect once `activations` says `static`.
        activation_amax: Largest magnitude that calibration saw in the input. An INT8 scale may cover less, to make its
            steps finer; an FP8 scale covers it.
        weights: `int8` where a module that is kept holds its weight in INT8 (W8A16); None otherwise.
        ratio: Max-median ratio of the input.
        clip: What the scale covers, as a multiple of the calibrated range: a share that was searched for, or more than
            1, for a margin.
        noise: Squared error that INT8 here adds to the residual stream, relative to the stream; estimated.
        reason: Why a module is not quantized, or not in the precision asked for.
    """

    precision: Literal["int8", "fp8", "float16", "bfloat16", "float32"]
    activations: ActivationKind | None = None
    activation_scale: PositiveFloat | None = None
    activation_amax: PositiveFloat | None = None
    weights: Literal["int8"] | None = None
    ratio: float | None = None
    clip: float | None = None
    noise: float | None = None
    reason: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _static_by_default(cls, document: Any) -> Any:
        return {"activations": "static", **document} if _is_quantized(document) else document

    @model_validator(mode="after")
    def _static_activations_need_a_scale(self) -> "ModulePlan":
        if self.static_scale is None and self.activations == "static" and self.number_format:
            raise ValueError(f"precision {self.precision} with static activations needs an activation_scale")
        return self

    @property
    def static_scale(self) -> float | None:
        """Scale of the input of a quantized module; None where each token has its own, or nothing is quantized."""
        return self.activation_scale if self.number_format and self.activations == "static" else None

    @property
    def per_token(self) -> bool:
        """Whether the input is quantized with a scale per token."""
        return self.number_format is not None and self.activations == "per-token"

    @property
    def number_format(self) -> NumberFormat | None:
        """Format of weight and input; None where the module is kept."""
        return self.precision if self.precision in ("int8", "fp8") else None

    @property
    def product_dtype(self) -> Dtype:
        """Precision in which the graph hands the product its input and takes its result: float32 around quantizers."""
        match self.precision:
            case "int8" | "fp8":
                return "float32"
            case kept:
                return kept


class AttentionPlan(_Document):
    """Steps of one attention's quantized operands (range / 127), each [batch, heads, tokens, head_dim]."""

    query: PositiveFloat
    key: PositiveFloat
    value: PositiveFloat


class KvCachePlan(_Document):
    """Steps of one attention's keys (behind the rope) and values in an INT8 cache.

    Attributes:
        key: Base64 of one signed byte k per channel of the key/value heads: the step is 2 ** (k / 8).
        value: Likewise.
    """

    key: str
    value: str


class RotationPlan(_Document):
    """An orthogonal rotation of the residual stream, made anew from its seed.

    Attributes:
        kind: `hadamard` (a Hadamard matrix with random signs), or `orthogonal` where the width has none.
    """

    kind: Literal["hadamard", "orthogonal"]
    seed: int


class HadamardPlan(_Document):
    """A Hadamard transform of what every `down_proj` reads, which the graph computes at run time."""

    block: HadamardBlock

    def __str__(self) -> str:
        """Where it is and how large its blocks are."""
        return f"blocks of {self.block} at down_proj"


class SmoothingPlan(_Document):
    """Scales by which the channels of one input are divided, and its readers' columns multiplied.

    Attributes:
        form: Formula: SmoothQuant's, of the largest or of typical magnitudes, or the threshold of Outlier Suppression+.
        parameter: Its strength (SmoothQuant), or its threshold as a share of the input's range.
        exponents: Base64 of one signed byte k per channel: the scale is 2 ** (k / 8). For `o_proj` one per channel of
            the key/value heads, which the query heads of a group share.
    """

    form: Literal["smoothquant", "smoothquant-typical", "outlier-suppression"]
    parameter: float
    exponents: str


class CurvePoint(_Document):
    """One evaluated set: the modules with the highest scores kept, the rest quantized.

    Attributes:
        criterion: The score: the max-median ratio, or the estimated noise.
        fp16_modules: Linears kept in 16 bit (siblings counted).
        fp16_share: Their share of the linears' multiply-accumulates.
        alpha: Threshold that yields this set; modules with score > alpha are kept.
        perplexity: On the search windows, with the scheme simulated.
        pareto: Whether no other evaluated set is both smaller and better.
    """

    criterion: Criterion = "ratio"
    fp16_modules: int
    fp16_share: float = 0.0
    alpha: float
    perplexity: float
    pareto: bool = True


class ActivationCandidate(_Document):
    """One set of inputs with a scale per token; all others have a constant.

    Attributes:
        per_token_linears: Linears that read such an input.
        per_token_share: Their share of the linears' multiply-accumulates.
        perplexity: On the search windows, with every linear quantized.
        divergence: KL divergence from the unquantized model there, per token in nats; what the choice goes by.
    """

    per_token_linears: int
    per_token_share: float
    perplexity: float
    divergence: float
    verdict: str


class KeptWeightsCandidate(_Document):
    """One way for the modules that stay in 16 bit to hold their weights.

    Attributes:
        weights: 16 bit, or INT8 with 16-bit products (W8A16).
        linears: Linears that stay in 16 bit.
        bytes: Of their weights.
        perplexity: On the search windows, with all other linears quantized.
        divergence: KL divergence from the unquantized model there, per token in nats; what the choice goes by.
    """

    weights: ExcludedWeights
    linears: int
    bytes: int
    perplexity: float
    divergence: float
    verdict: str


class TransformCandidate(_Document):
    """One way to transform the weights that competed.

    Attributes:
        name: `none`, `smoothing`, or the rotation's kind and seed; with `+ Hadamard` where `down_proj`'s inputs are
            transformed at run time, and `+ Hadamard at every input` where those of the blocks are too.
        perplexity: On the search windows, with every linear quantized, and scales per token where inputs may have them.
        divergence: KL divergence from the unquantized model there, per token in nats; what the choice goes by.
    """

    name: str
    perplexity: float
    divergence: float
    verdict: str


class HeadCandidate(_Document):
    """One way to smooth the input of the head that competed.

    Attributes:
        name: `none`, or the formula and its parameter.
        divergence: KL divergence of a head in INT8 from the model's own head, on the unquantized model's states there,
            per token in nats; what the choice goes by.
    """

    name: str
    divergence: float
    verdict: str


class PrefixCandidate(_Document):
    """One prefix that competed (an empty one stands for no prefix).

    Attributes:
        worst_module: The module with the highest ratio, which is `ratio`.
        reference_perplexity: Of the unquantized model behind this prefix, on the search windows.
        perplexity: With every linear smoothed and quantized there; None when the candidate was turned down before.
    """

    token_ids: tuple[int, ...]
    text: str
    worst_module: str
    ratio: float
    reference_perplexity: float | None = None
    perplexity: float | None = None
    verdict: str


class Search(_Document):
    """How the choices were made, kept so that they can be questioned.

    Attributes:
        reference_perplexity: Of the unquantized model on the search windows, behind the prefix.
        plain_reference_perplexity: The same without a prefix: a neutral prefix leaves it as it is.
        forward_tokens: What the search of the prefix cost, in tokens through the whole model.
        transforms: Rotations and smoothings that competed.
        head: Smoothings of the head's input that competed, the chosen one first.
        activations: Sets of inputs with a scale per token that competed.
        curve: Sets of modules that were evaluated.
        kept_weights: Forms of the weights of the modules in 16 bit that competed.
        prefixes: Prefixes that competed.
    """

    reference_perplexity: float | None = None
    plain_reference_perplexity: float | None = None
    forward_tokens: int | None = None
    transforms: tuple[TransformCandidate, ...] = ()
    head: tuple[HeadCandidate, ...] = ()
    activations: tuple[ActivationCandidate, ...] = ()
    curve: tuple[CurvePoint, ...] = ()
    kept_weights: tuple[KeptWeightsCandidate, ...] = ()
    prefixes: tuple[PrefixCandidate, ...] = ()


class Recipe(_Document):
    """A complete plan: for every decoder linear its precision, scale and why, and which prefix.

    `modules` is keyed by HF module name. Modules that share an input share its kind and its scale bit for bit, because
    TensorRT merges their products only then. `attention` and `kv_cache` are keyed by HF name of the attention block,
    `smoothing` and `input_hadamard` by the representative module of the input, `value_rotation` by the `o_proj` behind
    the value heads that a Hadamard transform rotates. `input_hadamard` has the inputs of attention and feed-forward
    blocks that pass a Hadamard transform at run time, with the channels of its blocks. Rotations, Hadamard transforms
    and smoothing leave the unquantized model's function as it is; ratios and scales are those of the transformed model.
    `head_smoothing` scales the channels of the final norm's output for a head that rounds its tokens; with another
    `scheme.head` nothing reads it.
    """

    format: Literal[2] = 2
    model: ModelSource
    corpus: CorpusSource
    scheme: Scheme
    alpha: float | None
    criterion: Criterion = "ratio"
    prefix: Prefix | None
    modules: Mapping[ModuleName, ModulePlan]
    attention: Mapping[ModuleName, AttentionPlan] = Field(default_factory=dict)
    kv_cache: Mapping[ModuleName, KvCachePlan] = Field(default_factory=dict)
    rotation: RotationPlan | None = None
    hadamard: HadamardPlan | None = None
    input_hadamard: Mapping[ModuleName, HadamardBlock] = Field(default_factory=dict)
    smoothing: Mapping[ModuleName, SmoothingPlan] = Field(default_factory=dict)
    value_rotation: Mapping[ModuleName, HadamardBlock] = Field(default_factory=dict)
    head_smoothing: SmoothingPlan | None = None
    search: Search = Search()

    @model_validator(mode="before")
    @classmethod
    def _brought_up_to_date(cls, document: Any) -> Any:
        return _of_format_1(document) if isinstance(document, Mapping) and document.get("format") == 1 else document

    @model_validator(mode="after")
    def _fp8_leaves_attention_alone(self) -> "Recipe":
        fp8 = next((name for name, plan in self.modules.items() if plan.precision == "fp8"), None)
        if self.attention and fp8:
            raise ValueError(f"{fp8}: precision fp8 does not go with operands of attention in INT8; remove either")
        return self

    @model_validator(mode="after")
    def _keys_are_rounded_once(self) -> "Recipe":
        if self.attention and self.kv_cache:
            raise ValueError("attention and kv_cache both round keys and values to INT8; remove either")
        return self

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """Token ids of the prefix; empty when there is none."""
        return self.prefix.token_ids if self.prefix else ()

    def kept(self) -> tuple[str, ...]:
        """Names of the linears that are not quantized, routers included."""
        return tuple(name for name, plan in self.modules.items() if plan.number_format is None)

    def hadamard_places(self) -> str:
        """Where activations pass a Hadamard transform at run time, in words."""
        places = [str(self.hadamard)] if self.hadamard else []
        if self.input_hadamard:
            places.append(f"inputs of attention and feed-forward blocks: {len(self.input_hadamard)}")
        return ", ".join(places) or "none"

    def activations(self) -> str:
        """How the quantized linears' inputs are scaled, in words: all alike, or how many in which way."""
        counts = Counter(str(plan.activations) for plan in self.modules.values() if plan.number_format)
        if len(counts) < 2:
            return "".join(counts) or "unquantized"
        return ", ".join(f"{counts[kind]} {kind}" for kind in ("static", "per-token"))

    def notes(self) -> tuple[str, ...]:
        """What a user has to know: of the prefix, and of a precision that is another than asked for."""
        reason = self.scheme.unquantized_reason
        changed = (f"everything that is not quantized is {self.scheme.unquantized}: {reason}",) if reason else ()
        unreached = sum(plan.reason == UNREACHED for plan in self.modules.values())
        blind = (
            f"{unreached} linears of experts stay in float32: calibration routed no token to them; give more samples"
        )
        return (*changed, *((blind,) if unreached else ()), *(self.prefix.notes if self.prefix else ()))

    def kept_linears(self) -> tuple[str, ...]:
        """Names of the linears that are not quantized although they might be: routers left out."""
        return tuple(name for name in self.kept() if self.modules[name].reason != "router")


_FORMAT_1_ACTIVATIONS = ("int8-per-tensor-static", "int8-per-token-dynamic")
"""What `scheme.activations` said of all modules at once, in the first format of the document."""


def _of_format_1(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document of the first format in today's form.

    There the scheme named the activations' scales, and a module without an `activation_scale` had one per token where
    the scheme was dynamic. A part that is not as it should be is left to the validation.
    """
    found = {**document, "format": 2}
    scheme, modules = document.get("scheme"), document.get("modules")
    if (
        not isinstance(scheme, Mapping)
        or scheme.get("activations", _FORMAT_1_ACTIVATIONS[0]) not in _FORMAT_1_ACTIVATIONS
    ):
        return found
    found["scheme"] = {key: value for key, value in scheme.items() if key != "activations"}
    if scheme.get("activations") == _FORMAT_1_ACTIVATIONS[1] and isinstance(modules, Mapping):
        found["modules"] = {name: _with_own_kind(plan) for name, plan in modules.items()}
    return found


def _with_own_kind(plan: Any) -> Any:
    unscaled = _is_quantized(plan) and plan.get("activation_scale") is None
    return {"activations": "per-token", **plan} if unscaled else plan


def _is_quantized(plan: Any) -> bool:
    """Return whether a module's plan that is not validated yet names a number format."""
    return isinstance(plan, Mapping) and plan.get("precision") in tuple(LARGEST)  # whatever stands there may be a list


def activation_scale(amax: float, number_format: NumberFormat = "int8") -> float:
    """Return the scale of a symmetric quantizer that covers magnitudes up to `amax`: the step, for INT8.

    The result is a float32 value, so that the recipe, the simulation and the graph agree to the last bit.
    A tensor that is all zeros gets the scale of `SMALLEST_AMAX`.
    """
    import numpy as np

    if not math.isfinite(amax) or amax < 0:
        raise RecipeError(f"amax is {amax}; expected a finite value >= 0: the calibration forward overflowed")
    return float(np.float32(max(amax, SMALLEST_AMAX) / LARGEST[number_format]))


_BY_LINE = ("modules", "attention", "kv_cache", "smoothing")
"""Parts of the document that are written one entry a line."""


def recipe_text(recipe: Recipe) -> str:
    """Return the recipe as its file holds it: indented JSON, a line per module, so that it can be read and edited."""
    document = recipe.model_dump(mode="json")
    parts = {key: recipe.model_dump(mode="json", include={key}, exclude_none=True)[key] for key in _BY_LINE}
    for key in _BY_LINE:
        if parts[key]:
            document[key] = f"<{key}>"
    text = json.dumps(document, indent=1, ensure_ascii=False)
    for key, entries in parts.items():
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(plan)}" for name, plan in entries.items())
        text = text.replace(f'"{key}": "<{key}>"', f'"{key}": {{\n{lines}\n }}', 1)
    return text + "\n"


def recipe_sha256(recipe: Recipe) -> str:
    """Return the SHA-256 of the recipe's text as `save_recipe` writes it, in hexadecimal."""
    return hashlib.sha256(recipe_text(recipe).encode()).hexdigest()


def save_recipe(recipe: Recipe, path: Path | str) -> None:
    """Write a recipe atomically."""
    write_text(Path(path), recipe_text(recipe))


def load_recipe(path: Path | str) -> Recipe:
    """Read and validate a recipe.

    Raises:
        RecipeError: The file is missing, not JSON, or not a recipe; the first fault is named.
    """
    try:
        text = read_document(Path(path))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot read the recipe: {getattr(error, 'strerror', None) or error}") from error
    try:
        return Recipe.model_validate_json(text)
    except ValidationError as error:
        raise RecipeError(f"{path}: {first_fault(error)}") from error
