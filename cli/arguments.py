"""The options of the commands, in groups that several commands share. Their texts are the help."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter

from spike_export.artifacts.results.accuracy_limits import AccuracyLimits

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
_LOAD = Group("Load", sort_key=4)
_SERVER = Group("Server", sort_key=4)
_RUN = Group("Run", sort_key=5)


@Parameter(name="*", group=_CALIBRATION)
@dataclass(frozen=True, kw_only=True)
class CorpusArguments:
    """Text to calibrate and evaluate on."""

    corpus: Annotated[tuple[str, ...], Parameter(negative="")] = ()
    """Text to calibrate on, best of your own domain: a .txt, .jsonl or .parquet file, a data set's folder, or
    org/name[:config] on the hub. Repeat the option for several kinds of text. Built in, offline, and together the
    default: builtin:help-topics (of Python's standard library) and builtin:own-text (the model writes it)."""

    corpus_weight: Annotated[tuple[float, ...], Parameter(negative="")] = ()
    """Weight of each corpus, one for each --corpus in their order: calibration takes windows in this proportion
    (default: equal)."""

    text_field: str | None = None
    """Key or column of the records that holds the text (default: text) or, with --chat-template, the messages (default:
    messages or conversations)."""

    corpus_split: str | None = None
    "Split of a data set (default: train)."

    chat_template: Annotated[bool, Parameter(negative="")] = False
    "The records are conversations; render them with the model's chat template."

    windows: Literal["packed", "documents"] = "packed"
    "Cut windows from the stream of all documents (packed), or each window inside one long enough document."

    samples: int = 32
    "Number of calibration windows."

    length: int = 512
    "Tokens per window, including BOS."

    seed: int = 0
    "Seed of the positions of the calibration windows."


@Parameter(name="*", group=_QUANTIZATION)
@dataclass(frozen=True, kw_only=True)
class QuantizationArguments:
    """How to quantize, and which modules to leave in 16 bit."""

    qfem: bool = True
    "QFeM: keep modules whose max-median ratio exceeds a threshold in 16 bit."

    qfep: bool = True
    "QFeP: search a prefix that takes the activation spikes."

    alpha: float | None = None
    "Threshold of QFeM (default: searched by perplexity)."

    max_fp16_modules: Annotated[int | None, Parameter(name="--max-fp16-modules")] = None
    "Keep the modules with the highest ratios in 16 bit, this number of linears at most."

    max_fp16_share: Annotated[float, Parameter(name="--max-fp16-share")] = 0.05
    "Largest share of the linears' multiply-accumulates that the search keeps in 16 bit."

    max_per_token_share: float = 0.3
    "Largest share of the linears' multiply-accumulates whose inputs the choice of --activations auto scales per token."

    tolerance: float = 0.005
    "Relative perplexity increase over its goal that the search of the modules accepts."

    prefix_length: int = 5
    "Largest number of tokens in the prefix, 1 to 5."

    smoothing: bool = True
    "Search smoothing scales for every input; they move from activations to weights."

    rotation: Literal["auto", "always", "never"] = "never"
    """Rotate the residual stream: compare with smoothing alone (auto), always or never. A rotation adds the head's
    weight to the bundle where head and embedding are tied."""

    hadamard: Literal["auto", "down_proj", "always", "never"] = "auto"
    """Hadamard transform of inputs at run time, which spreads their largest channels: of down_proj's if it saves a
    tenth of the divergence on held-out text, and of the other blocks' inputs if that saves another tenth (auto), of
    down_proj's at most (down_proj), always or never. Formats for other engines cannot express it."""

    value_rotation: Literal["auto", "never"] = "auto"
    """Rotate attention's value heads in the weights, which costs nothing at run time: in the layers where o_proj is
    more accurate with it (auto), or never."""

    weights: Literal["int8-per-channel", "int8-per-tensor"] = "int8-per-channel"
    "Scales of INT8 weights."

    activations: Literal["auto", "static", "per-token"] = "auto"
    """Scales of INT8 activations: constants (static, fastest), one per token at run time (per-token, most accurate), or
    constants except where a scale per token brings most on held-out text (auto)."""

    activation_range: Literal["sample-mean", "mse", "percentile", "max"] = "sample-mean"
    """What a static activation scale covers: the mean of the samples' maxima, the range with the least squared error,
    the 99.9th percentile of the tokens' maxima, or the largest value of all."""

    excluded_weights: Literal["auto", "unquantized", "int8"] = "unquantized"
    """Weights of the modules that QFeM keeps: 16 bit (fastest), INT8 with 16-bit products (W8A16, half the bytes), or
    INT8 unless 16 bit saves a tenth of the divergence on held-out text (auto)."""

    attention: Literal["unquantized", "int8-per-tensor-static"] = "unquantized"
    "Operands of attention's matrix products: query, key and value."

    kv_cache_dtype: Literal["unquantized", "int8"] = "unquantized"
    """Keys and values in the cache: not quantized, or INT8 with a measured step per channel, in a quarter (float32) or
    half of the bytes."""

    head: Literal["unquantized", "int8-weights", "int8-per-token-dynamic"] = "unquantized"
    """Language-model head: not quantized, INT8 weights, or INT8 weights and an INT8 input with one scale per token. A
    head that is tied to the embedding gets an INT8 copy."""


@Parameter(name="*", group=_EXECUTION)
@dataclass(frozen=True, kw_only=True)
class ExecutionArguments:
    """Where and how calibration runs the model."""

    device: Annotated[tuple[str, ...], Parameter(negative="")] = ()
    "torch device, such as cuda or cuda:1; repeat the option to share the windows among devices (default: cpu)."

    compute_dtype: Dtype = "float32"
    "Precision of the calibration's forward passes."

    layers: Literal["auto", "resident", "streamed"] = "auto"
    "Keep all layers in memory, or read them again in every pass (auto: as the memory allows)."


@Parameter(name="*", group=_EXECUTION)
@dataclass(frozen=True, kw_only=True)
class ClusterArguments:
    """Which Ray cluster the windows are spread over."""

    ray: str | None = None
    """Spread the windows over a Ray cluster: auto (the one of this machine, or RAY_ADDRESS), local (a new one on this
    machine) or HOST:PORT; extra `ray` (default: all in this process)."""

    ray_workers: int | None = None
    "Workers (default: as many as the cluster has processors or GPUs for)."

    ray_cpus: int | None = None
    "Processors, and threads, of a worker (default: 1)."

    ray_gpus: int | None = None
    "GPUs of a worker, together with --device cuda (default: 0)."


@Parameter(name="*", group=_QUANTIZATION)
@dataclass(frozen=True, kw_only=True)
class DtypeArguments:
    """Precision of everything that is not quantized."""

    dtype: Dtype = "float16"
    "Precision of embeddings, residual stream, attention, cache, head, and modules that are not quantized."


@Parameter(name="*", group=_GRAPH)
@dataclass(frozen=True, kw_only=True)
class GraphArguments:
    """Cache and outputs of the graph."""

    kv_cache: Literal["dynamic", "static"] = "dynamic"
    "Key/value cache: one that grows with every call (dynamic), or a buffer of fixed size, written in place (static)."

    capacity: int | None = None
    "Tokens per sequence in a static cache, without the prefix; attention reads the whole buffer in every call."

    logits: Literal["all", "last"] = "all"
    "Logits of all tokens, or of each sequence's last token only, for generation (pad batches on the left)."


@Parameter(name="*", group=_QUANTIZATION)
@dataclass(frozen=True, kw_only=True)
class FormatArguments:
    """Number format of quantized operands."""

    number_format: NumberFormat = "int8"
    "Format of quantized weights and activations. fp8 is E4M3, for GPUs from SM89 on; the search simulates int8."


@Parameter(name="*", group=_CHECK)
@dataclass(frozen=True, kw_only=True)
class GateArguments:
    """How accuracy is judged."""

    text: Annotated[tuple[str, ...], Parameter(negative="")] = ()
    "Text of another kind than the calibration's, to judge on too (default: source of Python's standard library)."

    max_ppl_increase: Annotated[float | None, Parameter(name="--max-ppl-increase")] = None
    "Largest relative perplexity increase over the unquantized model behind the same prefix; exit code 1 above it."

    max_kl: Annotated[float | None, Parameter(name="--max-kl")] = None
    "Largest mean KL divergence from the same model, in nats per token; exit code 1 above it."

    min_agreement: Annotated[float | None, Parameter(name="--min-agreement")] = None
    "Smallest share of positions with the same most likely token, such as 0.95; exit code 1 below it."

    @property
    def limits(self) -> AccuracyLimits:
        """The limits; checked here."""
        return AccuracyLimits(self.max_ppl_increase, self.max_kl, self.min_agreement)


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
    "Compiler (auto: tensorrt where TensorRT and a GPU are present, else tensorrt-rtx, which builds on the CPU)."

    target: Annotated[tuple[str, ...], Parameter(negative="")] = ()
    "Compute capability such as SM86; repeat the option for several (default: those the backend builds by default)."

    profiles: Profiles = "both"
    """Prefill and decode in one plan (both), in two plans OUT.prefill and OUT.decode, built one after another in less
    memory (split), or one of them. TensorRT-RTX stores the weights once per profile."""

    max_batch: int = 1
    "Largest number of sequences per call."

    typical_batch: int = 1
    "Number of sequences per call that kernels are chosen for."

    max_context: int | None = None
    "Longest sequence in tokens (default: a static cache's capacity, else 2048 or the model's limit)."

    max_prompt: int | None = None
    "Largest number of tokens in one call (default: --max-context)."

    typical_prompt: int = 256
    "Prompt length in tokens that kernels are chosen for."

    plan_capacity: int | None = None
    "Capacity of the static cache in this plan, if less than the bundle's capacity."

    optimization_level: int | None = None
    "TensorRT's builder optimization level, 0 to 5 (default: 3)."

    refit: Annotated[bool, Parameter(negative="")] = False
    "Allow other weights to be put into the finished plan."

    strip_weights: Annotated[bool, Parameter(negative="")] = False
    "Leave out weights that can be put back from the bundle when the plan is loaded."

    weight_streaming: Annotated[bool, Parameter(negative="")] = False
    "Allow weights to stay in host memory and to be copied to the GPU when they are needed."

    hardware_compatible: Literal["ampere-plus", "same-compute-capability"] | None = None
    "Further GPUs that the plan runs on (tensorrt only): all from Ampere on, or those of this compute capability."

    version_compatible: Annotated[bool, Parameter(negative="")] = False
    "Allow the plan to run in later versions of TensorRT (tensorrt only)."

    timing_cache: Path | None = None
    "File that keeps kernel timings between builds (tensorrt only); created if missing."

    ignore_memory: Annotated[bool, Parameter(negative="")] = False
    "Build although the estimated memory exceeds the available memory."

    allow_fallback: Annotated[bool, Parameter(negative="")] = False
    "Accept a plan in which a module that was planned in INT8 or FP8 runs in 16 bit."


@Parameter(name="*", group=_GENERATION)
@dataclass(frozen=True, kw_only=True)
class SamplingArguments:
    """Sampling and the end of the text; defaults come from the model's generation_config.json."""

    max_new_tokens: int | None = None
    "Largest number of new tokens (default: 128)."

    do_sample: bool | None = None
    """Draw from the distribution instead of taking the most probable token; temperature, top-k, top-p, min-p and seed
    imply it."""

    temperature: float | None = None
    "Divides the logits."

    top_k: int | None = None
    "Draw from the k most probable tokens; 0 for all."

    top_p: float | None = None
    "Draw from the most probable tokens that together reach this probability."

    min_p: float | None = None
    "Draw from tokens with at least this share of the highest probability."

    repetition_penalty: float | None = None
    "Above 1: makes tokens that occurred already less probable."

    seed: int | None = None
    "Seed of the draws; prompt i draws with seed + i (default: a new seed each time)."

    stop: Annotated[tuple[str, ...], Parameter(negative="")] = ()
    "End the text before this string; repeat the option for several."

    ignore_eos: Annotated[bool | None, Parameter(negative="")] = None
    "Continue behind tokens that end a sequence."

    logprobs: int | None = None
    "With --json: log-probability of each token, and of this number of most probable tokens."


@Parameter(name="*", group=_PLAN)
@dataclass(frozen=True, kw_only=True)
class RuntimeArguments:
    """How TensorRT runs a plan."""

    gpu: int | None = None
    "Index of the GPU (default: 0)."

    weight_budget: int | Literal["auto"] | None = None
    """For a plan built with --weight-streaming: bytes of weights that stay on the GPU while the rest is streamed; auto
    lets TensorRT decide (default: all stay)."""

    cuda_graphs: bool | None = None
    "Launch a decode step over a static cache as one CUDA graph (default: yes)."


@Parameter(name="*", group=_SERVER)
@dataclass(frozen=True, kw_only=True)
class ServerArguments:
    """Where a server listens, who may ask, and how much."""

    host: str | None = None
    "Address to listen on (default: 127.0.0.1, this machine only)."

    port: int | None = None
    "Port to listen on; 0 for any free one (default: 8000)."

    model: Annotated[str | None, Parameter(name="--model-name")] = None
    "Name of the model in requests (default: name of the bundle's folder or of the plan's file)."

    alias: Annotated[tuple[str, ...], Parameter(negative="")] = ()
    "Further name that requests may give the model; repeat the option for several (default: none)."

    api_key: Annotated[tuple[str, ...], Parameter(negative="")] = ()
    "Key that requests have to show; repeat the option for several. Other users of the machine can read it here."

    api_key_file: Path | None = None
    "File with one key a line."

    rows: int | None = None
    "Most sequences that are computed together (default: 8)."

    queue: int | None = None
    "Most sequences that wait for a row; more are answered 429 (default: 64)."

    prefill_budget: int | None = None
    "Tokens of prompts that are read between two steps of the sequences in progress (default: 256)."

    prefix_cache: int | None = None
    "Bytes for keys and values of prompts; prompts that begin alike are then read once (default: 268435456; 0: none)."

    max_new_tokens: int | None = None
    "Most tokens of an answer (default: what the context has room for)."

    max_body: int | None = None
    "Largest body of a request in bytes (default: 4194304)."

    timeout: float | None = None
    "Longest time for an answer in seconds (default: 600)."

    drain: float | None = None
    "Seconds that running requests get after SIGTERM (default: 30)."

    allow_origin: Annotated[tuple[str, ...], Parameter(negative="")] = ()
    "Web origin whose pages may ask, such as https://example.com, or * for all; repeat it for several (default: none)."

    engine_process: bool | None = None
    """Compute in a process of its own, so that a crash of native code does not end the server (default: yes; no saves
    about 100 MB)."""

    engine_idle: float | None = None
    """Seconds after which the engine's process hangs and is ended: it owes an answer and uses no processor time
    (default: 30)."""


@Parameter(name="*", group=_SERVER)
@dataclass(frozen=True, kw_only=True)
class TritonArguments:
    """How much a model of Triton computes at once; written to `config.pbtxt`, where it may be changed."""

    rows: int | None = None
    "Most sequences that are computed together (default: 8)."

    queue: int | None = None
    "Most sequences that wait for a row; more are refused (default: 64)."

    prefill_budget: int | None = None
    "Tokens of prompts that are read between two steps of the sequences in progress (default: 256)."

    prefix_cache: int | None = None
    "Bytes for keys and values of prompts; prompts that begin alike are then read once (default: 268435456; 0: none)."

    timeout: int | None = None
    "Longest time for an answer in seconds (default: 600)."


@Parameter(name="*", group=_LOAD)
@dataclass(frozen=True, kw_only=True)
class LoadArguments:
    """What the clients of a load ask for."""

    requests: int = 32
    "Requests of all clients together, for each --concurrency."

    prompt_words: int = 128
    "Words of a prompt, about as many tokens; all prompts differ."

    shared_words: int = 0
    "Words that all prompts begin with, besides."

    new_tokens: int = 64
    "Tokens of every answer."

    spread: float = 0.0
    "Share by which the lengths of prompts and answers differ, at most: 0.75 for a quarter to seven quarters."

    chat: Annotated[bool, Parameter(negative="")] = False
    "Ask through /v1/chat/completions, for servers without completions."

    seed: int = 0
    "Seed of the prompts."


@Parameter(name="*", group=_RUN)
@dataclass(frozen=True, kw_only=True)
class ThreadArguments:
    """How much of the machine to use."""

    threads: int | None = None
    "Processor threads that one computation uses, in every stage (default: OMP_NUM_THREADS, else one per processor)."


@Parameter(name="*", group=_RUN)
@dataclass(frozen=True, kw_only=True)
class LoweringArguments:
    """With which operators ONNX Runtime computes."""

    lowering: Annotated[bool, Parameter(negative="--no-lowering")] = True
    "Use ONNX Runtime's own operators where they are faster on a CPU; --no-lowering runs the bundle's standard ones."
    weights_copy: Annotated[
        Literal["never", "auto"],
        Parameter(
            help="Hold INT8 weights a second time for steps of a single row over a static cache, where the processor "
            "has VNNI: such a step is faster, and its numbers are not those of a step in a batch."
        ),
    ] = "never"


@Parameter(name="*", group=_RUN)
@dataclass(frozen=True, kw_only=True)
class ProgramArguments:
    """How the program itself behaves."""

    config: Path | None = None
    "TOML file with any of these options; options of a command stand in a table of the command's name."

    debug: Annotated[bool, Parameter(negative="")] = False
    "Print the traceback of a fault of the program (exit code 3), which is otherwise only written to a file."


@Parameter(name="*", group=_RUN)
@dataclass(frozen=True, kw_only=True)
class RunArguments(ProgramArguments):
    """How to run."""

    force: Annotated[bool, Parameter(negative="")] = False
    "Run every stage again, also stages whose inputs are unchanged."

    overwrite: Annotated[bool, Parameter(negative="")] = False
    "Replace files and folders at the places of results even if spike-export did not write them."

    quiet: Annotated[bool, Parameter(negative="")] = False
    "Print errors only."


AsJson = Annotated[
    bool,
    Parameter(
        name="--json", negative="", group="Run", help="Print one JSON document; progress goes to standard error."
    ),
]

Recompute = Annotated[
    Literal["recipe"] | None,
    Parameter(
        group="Run", help="recipe: discard a recipe that was edited by hand into recipe.json.old, and choose anew."
    ),
]


def values(arguments: Any) -> dict[str, Any]:
    """Return a group's options by name."""
    return {field.name: getattr(arguments, field.name) for field in fields(arguments)}
