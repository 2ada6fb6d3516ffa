"""The options of the commands, in groups that several commands share. Their texts are the help."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter

Dtype = Literal["float16", "bfloat16", "float32"]
NumberFormat = Literal["int8", "fp8"]
Model = Annotated[str, Parameter(help="Local HF directory, .gguf file, or hub id.")]
Bundle = Annotated[Path, Parameter(help="Folder that export wrote.")]

_CALIBRATION = Group("Calibration", sort_key=1)
_QUANTIZATION = Group("Quantization", sort_key=2)
_EXECUTION = Group("Execution", sort_key=3)
_GRAPH = Group("Graph", sort_key=3)
_CHECK = Group("Check", sort_key=3)
_BUILD = Group("Engine", sort_key=4)
_GENERATION = Group("Generation", sort_key=4)
_PLAN = Group("Running a plan", sort_key=4)
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

    max_fp16_share: Annotated[float, Parameter(name="--max-fp16-share")] = 0.05
    "Largest share of the linears' multiply-accumulates that the automatic choice keeps in 16 bit."

    tolerance: float = 0.005
    "Relative perplexity increase over its goal that the automatic choice accepts."

    prefix_length: int = 5
    "Most tokens of a prefix."

    smoothing: bool = True
    "Move scales from activations to weights, searched for every input."

    rotation: Literal["auto", "always", "never"] = "never"
    """Rotate the residual stream: tried beside smoothing alone, always or never. In a model whose head is tied to the
    embedding the bundle grows by the head."""

    weights: Literal["int8-per-channel", "int8-per-tensor"] = "int8-per-channel"
    "Scales of INT8 weights."

    activations: Literal["int8-per-tensor-static", "int8-per-token-dynamic"] = "int8-per-tensor-static"
    "Scales of INT8 activations: constants (fastest), or each token's own at run time (most accurate)."

    activation_range: Literal["sample-mean", "mse", "percentile", "max"] = "sample-mean"
    """What a static activation scale covers: the mean of the samples' maxima, the range with the least squared error,
    the 99.9th percentile of the tokens' maxima, or the largest value of all."""

    excluded_weights: Literal["unquantized", "int8"] = "unquantized"
    "Weights of the modules that QFeM keeps: in 16 bit, or in INT8 with 16-bit products (W8A16)."

    attention: Literal["unquantized", "int8-per-tensor-static"] = "unquantized"
    "Operands of attention's matrix products."

    head: Literal["unquantized", "int8-weights", "int8-per-token-dynamic"] = "unquantized"
    """Language-model head: as it is, from INT8 weights, or from INT8 weights and tokens with scales of their own. A
    head tied to the embedding gets a copy in INT8."""


@Parameter(name="*", group=_EXECUTION)
@dataclass(frozen=True, kw_only=True)
class ExecutionArguments:
    """Where and how calibration runs the model."""

    device: Annotated[tuple[str, ...], Parameter(negative="")] = ()
    "torch device, such as cuda or cuda:1; repeat for several, which share the windows (default: cpu)."

    compute_dtype: Dtype = "float32"
    "Precision of the calibration's forward passes."

    layers: Literal["auto", "resident", "streamed"] = "auto"
    "Whether layers stay in memory or are read anew in every pass (default: as the memory allows)."


@Parameter(name="*", group=_QUANTIZATION)
@dataclass(frozen=True, kw_only=True)
class DtypeArguments:
    """Precision of what is not quantized."""

    dtype: Dtype = "float16"
    "Precision of embeddings, residual stream, attention, cache, head, and of modules that are not quantized."


@Parameter(name="*", group=_GRAPH)
@dataclass(frozen=True, kw_only=True)
class GraphArguments:
    """What the graph keeps and gives."""

    kv_cache: Literal["dynamic", "static"] = "dynamic"
    "A cache of keys and values that grows with every call, or a buffer of fixed size that is written in place."

    capacity: int | None = None
    "Most tokens of a sequence in a static cache, the prefix not counted; attention reads all of it in every call."

    logits: Literal["all", "last"] = "all"
    "Logits of all tokens, or of each sequence's last token only, for generating (batches padded on the left)."


@Parameter(name="*", group=_QUANTIZATION)
@dataclass(frozen=True, kw_only=True)
class FormatArguments:
    """Number format of what is quantized."""

    number_format: NumberFormat = "int8"
    "Of quantized weights and activations. fp8 is E4M3, for GPUs from SM89 on; all choices are made as for int8."


@Parameter(name="*", group=_CHECK)
@dataclass(frozen=True, kw_only=True)
class GateArguments:
    """Limits on accuracy."""

    max_ppl_increase: Annotated[float | None, Parameter(name="--max-ppl-increase")] = None
    "Largest relative perplexity increase over the unquantized model, e.g. 0.05; exit code 1 when missed."


Profiles = Literal["both", "split", "prefill", "decode"]
PROFILES_OF: Mapping[Profiles, tuple[Literal["prefill", "decode"], ...]] = {
    "both": ("prefill", "decode"),
    "split": ("prefill", "decode"),
    "prefill": ("prefill",),
    "decode": ("decode",),
}


@Parameter(name="*", group=_BUILD)
@dataclass(frozen=True, kw_only=True)
class BuildArguments:
    """How to build the engine plan."""

    backend: Literal["auto", "tensorrt", "tensorrt-rtx"] = "auto"
    "Compiler: tensorrt where it and a GPU are present, else tensorrt-rtx, which builds on the CPU."

    target: Annotated[tuple[str, ...], Parameter(negative="")] = ()
    "Compute capability such as SM86; repeat for several (default: all that the backend builds for)."

    profiles: Profiles = "both"
    """Uses the engine serves: prefill and decode in one plan, each in a plan of its own (OUT.prefill and OUT.decode,
    built one after another, in less memory), or one of them. TensorRT-RTX stores the weights once per use."""

    max_batch: int = 1
    "Most sequences per call."

    typical_batch: int = 1
    "Sequences per call that the kernels are chosen for."

    max_context: int | None = None
    "Most tokens of a sequence (default: a static cache's capacity, else 2048 or what the model can do)."

    max_prompt: int | None = None
    "Most tokens in one call (default: --max-context)."

    typical_prompt: int = 256
    "Tokens of a prompt that the kernels are chosen for."

    plan_capacity: int | None = None
    "Tokens a static cache has room for in this plan, where that is to be less than the bundle's capacity."

    optimization_level: int | None = None
    "TensorRT's builder optimization level, 0 to 5 (default: 3)."

    refit: Annotated[bool, Parameter(negative="")] = False
    "Weights can be replaced by others in the finished plan."

    strip_weights: Annotated[bool, Parameter(negative="")] = False
    "Leave weights out of the plan that can be put back into it from the bundle."

    weight_streaming: Annotated[bool, Parameter(negative="")] = False
    "Weights may stay in host memory and come to the GPU when they are needed."

    hardware_compatible: Literal["ampere-plus", "same-compute-capability"] | None = None
    "Other GPUs the plan is to run on (tensorrt only): all from Ampere on, or those of this compute capability."

    version_compatible: Annotated[bool, Parameter(negative="")] = False
    "The plan also runs in later versions of TensorRT (tensorrt only)."

    timing_cache: Path | None = None
    "File that keeps kernel timings between builds (tensorrt only); made when missing."

    ignore_memory: Annotated[bool, Parameter(negative="")] = False
    "Build even when the estimated memory exceeds what is available."

    allow_fallback: Annotated[bool, Parameter(negative="")] = False
    "Accept a plan in which a module planned as INT8 or FP8 runs in 16 bit."


@Parameter(name="*", group=_GENERATION)
@dataclass(frozen=True, kw_only=True)
class SamplingArguments:
    """What is drawn, and where it ends; what is not given is as the model's generation_config.json says."""

    max_new_tokens: int | None = None
    "Most tokens of an answer (default: 128)."

    do_sample: bool | None = None
    """Draw from the distribution instead of taking the best token; temperature, top-k, top-p, min-p or seed ask for it
    too."""

    temperature: float | None = None
    "Divides the logits."

    top_k: int | None = None
    "Only the k most probable tokens; 0 for all."

    top_p: float | None = None
    "Only the most probable tokens that together reach this probability."

    min_p: float | None = None
    "Only tokens at least this share as probable as the most probable one."

    repetition_penalty: float | None = None
    "Makes tokens that are there already less probable, above 1."

    seed: int | None = None
    "Of the draws; prompt i draws with seed + i (default: another one each time)."

    stop: Annotated[tuple[str, ...], Parameter(negative="")] = ()
    "The text ends before this; repeat for several."

    ignore_eos: Annotated[bool | None, Parameter(negative="")] = None
    "Go on behind tokens that end a sequence."

    logprobs: int | None = None
    "With --json: log-probability of each token, and of so many of the most probable ones."


@Parameter(name="*", group=_PLAN)
@dataclass(frozen=True, kw_only=True)
class RuntimeArguments:
    """How TensorRT runs a plan."""

    gpu: int | None = None
    "Index of the GPU (default: 0)."

    weight_budget: int | Literal["auto"] | None = None
    """Bytes of weights that stay on the GPU while the rest is streamed, of a plan built with --weight-streaming; auto
    for what TensorRT thinks fit (default: all stay)."""

    cuda_graphs: bool | None = None
    "Launch a decode step over a static cache as one graph (default: yes)."


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
