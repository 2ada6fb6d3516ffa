"""The options of the commands, in groups that several commands share. Their texts are the help."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter

Dtype = Literal["float16", "bfloat16", "float32"]

_CALIBRATION = Group("Calibration", sort_key=1)
_QUANTIZATION = Group("Quantization", sort_key=2)
_CHECK = Group("Check", sort_key=3)
_BUILD = Group("Engine", sort_key=4)
_RUN = Group("Run", sort_key=5)


@Parameter(name="*", group=_CALIBRATION)
@dataclass(frozen=True, kw_only=True)
class CorpusArguments:
    """Text to calibrate and evaluate on."""

    corpus: str | None = None
    """Text of your own domain: a .txt, .jsonl or .parquet file, a dataset's folder, or org/name[:config] on the hub
    (default: help topics of Python's standard library, offline)."""

    text_field: str | None = None
    "Key of the text in the corpus's records (default: text), or of the messages (messages or conversations)."

    corpus_split: str | None = None
    "Split of a dataset (default: train)."

    chat_template: Annotated[bool, Parameter(negative="")] = False
    "The corpus's records are conversations: render them with the model's chat template."

    windows: Literal["packed", "documents"] = "packed"
    "Cut windows from the stream of all documents, or each inside one document that is long enough."

    samples: int = 32
    "Calibration windows."

    length: int = 512
    "Tokens per window, BOS included."

    seed: int = 0
    "Places the calibration windows."


@Parameter(name="*", group=_QUANTIZATION)
@dataclass(frozen=True, kw_only=True)
class QuantizationArguments:
    """How to quantize, and what not."""

    qfem: bool = True
    "Keep modules whose max-median ratio exceeds a threshold in 16 bit (QFeM)."

    qfep: bool = True
    "Search a prefix that takes the activation spikes (QFeP)."

    alpha: float | None = None
    "Threshold of QFeM (default: chosen by perplexity)."

    max_fp16_modules: Annotated[int | None, Parameter(name="--max-fp16-modules")] = None
    "Keep as many of the linears with the highest ratios as fit into this number."

    tolerance: float = 0.005
    "Relative perplexity increase over its goal that the automatic choice accepts."

    weights: Literal["int8-per-channel", "int8-per-tensor"] = "int8-per-channel"
    "Scales of INT8 weights."

    activation_range: Literal["sample-mean", "max"] = "sample-mean"
    "What a static activation scale covers: the mean of the samples' maxima, or the largest value of all."


@Parameter(name="*", group=_QUANTIZATION)
@dataclass(frozen=True, kw_only=True)
class DtypeArguments:
    """Precision of what is not quantized."""

    dtype: Dtype = "float16"
    "Precision of embeddings, residual stream, attention, cache, head, and of modules that are not quantized."


@Parameter(name="*", group=_CHECK)
@dataclass(frozen=True, kw_only=True)
class GateArguments:
    """Limits on accuracy."""

    max_ppl_increase: Annotated[float | None, Parameter(name="--max-ppl-increase")] = None
    "Largest relative perplexity increase over the unquantized model, e.g. 0.05; exit code 1 when missed."


@Parameter(name="*", group=_BUILD)
@dataclass(frozen=True, kw_only=True)
class BuildArguments:
    """How to build the engine plan."""

    backend: Literal["auto", "tensorrt", "tensorrt-rtx"] = "auto"
    "Compiler: tensorrt where it and a GPU are present, else tensorrt-rtx, which builds on the CPU."

    target: Annotated[tuple[str, ...], Parameter(negative="")] = ()
    "Compute capability such as SM86; repeat for several (default: all that the backend builds for)."

    profile: Annotated[tuple[Literal["prefill", "decode"], ...], Parameter(negative="")] = ("prefill", "decode")
    "Use the plan serves; repeat for both. TensorRT-RTX stores the weights once per profile."

    max_batch: int = 1
    "Most sequences per call."

    max_context: int | None = None
    "Most tokens of a sequence (default: 2048, or what the model can do)."

    optimization_level: int | None = None
    "TensorRT's builder optimization level, 0 to 5."

    ignore_memory: Annotated[bool, Parameter(negative="")] = False
    "Build even when the estimated memory exceeds what is available."

    allow_fallback: Annotated[bool, Parameter(negative="")] = False
    "Accept a plan in which a module planned as INT8 runs in 16 bit."


@Parameter(name="*", group=_RUN)
@dataclass(frozen=True, kw_only=True)
class RunArguments:
    """How to run."""

    force: Annotated[bool, Parameter(negative="")] = False
    "Run every stage again, also those whose inputs are unchanged."

    quiet: Annotated[bool, Parameter(negative="")] = False
    "Print errors only."

    config: Path | None = None
    "TOML file with any of these options; a sub-command's under its own table."


def values(arguments: Any) -> dict[str, Any]:
    """Return a group's options by name."""
    return {field.name: getattr(arguments, field.name) for field in fields(arguments)}
