"""The other ways from a model to a small one on a CPU, ready to be timed beside this project's bundles.

onnxruntime.quantization's static INT8, onnxruntime-genai's INT8 and INT4 weights, and torch in bfloat16. Each is built
from the same checkpoint as its own documentation says, and says why where it cannot be.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.hf_directory import write_hf_directory
from spike_export.artifacts.errors import one_line

if TYPE_CHECKING:
    from spike_export.artifacts.manifest import LogitsScope
    from spike_export.checkpoint.checkpoint import Checkpoint

Call = Callable[[], object]

GRAPH = "model.onnx"

_GENAI = "onnxruntime_genai"

_HEAD_NODE = "lm_head.MatMul"

_CALIBRATION_WINDOWS, _CALIBRATION_TOKENS = 4, 256


class UnavailableError(Exception):
    """A peer that cannot be built or run here; the message says why in one line."""


@contextmanager
def failures_told() -> Iterator[None]:
    """Let whatever another tool raises leave out this peer only.

    Raises:
        UnavailableError: With the tool's own message.
    """
    try:
        yield
    except UnavailableError:
        raise
    except Exception as error:
        raise UnavailableError(one_line(error)) from error


@dataclass(frozen=True)
class Sequences:
    """What is timed: a prompt of `prompt` tokens, and one token behind as many."""

    prompt: int
    vocabulary: int

    @cached_property
    def tokens(self) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """[prompt + 1] Random ids."""
        return np.random.default_rng(0).integers(0, self.vocabulary, self.prompt + 1)


@dataclass(frozen=True)
class Sources:
    """What peers are built from.

    Attributes:
        open_checkpoint: Opens the model; called once at most.
        float32: The unquantized float32 bundle that gives all logits.
        folder: Where artefacts are kept, and found again.
        gguf: The model's own file, where it is a GGUF one.
    """

    open_checkpoint: "Callable[[], Checkpoint]"
    float32: Path
    folder: Path
    gguf: Path | None = None

    @cached_property
    def checkpoint(self) -> "Checkpoint":
        """The model."""
        return self.open_checkpoint()


OpenOnnx = Callable[[Path, Sequence[str]], tuple[Call, Call]]
"""Opens an ONNX file with the named optimizers off and returns its calls of a prompt and of one token."""


@dataclass(frozen=True)
class Peer:
    """One other way.

    Attributes:
        logits: Of which tokens a prompt's call gives logits.
        artefact: Folder name; peers may share one.
        build: Writes the artefact into a folder.
        calls: (folder, sequences, threads, how to open ONNX) → calls of a prompt and of one token behind it.
    """

    name: str
    logits: "LogitsScope"
    artefact: str
    build: Callable[[Sources, Path], None]
    calls: Callable[[Path, Sequences, int, OpenOnnx], tuple[Call, Call]]

    def built(self, sources: Sources) -> Path:
        """Return the artefact's folder; it is built where it is not there yet.

        Raises:
            UnavailableError: A package is missing, or the peer's own tool fails.
        """
        return kept_artefact(sources, self.artefact, self.build)


def kept_artefact(sources: Sources, name: str, build: Callable[[Sources, Path], None]) -> Path:
    """Return the folder of an artefact, built where it is not there yet.

    Raises:
        UnavailableError: A package is missing, or the peer's own tool fails.
    """
    from spike_export.artifacts.files.atomic_write import atomic_path

    place = sources.folder / name
    if not place.exists():
        with failures_told(), atomic_path(place) as folder:
            folder.mkdir()
            build(sources, folder)
    return place


def require(module: str, package: str) -> Any:
    """Import a module of another tool.

    Raises:
        UnavailableError: Its package is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise UnavailableError(f"{package} is not installed ({error})") from error


def _quantized_static(sources: Sources, folder: Path, *, own_pairs: bool) -> None:
    """Quantize the float32 bundle's MatMuls, the head excepted, as the decoder's linears are in ours.

    MatMuls' outputs are left alone: quantized, as the tool does by default, they ruin the model.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    quantize_static(
        sources.float32 / GRAPH,
        folder / GRAPH,
        _windows(sources),
        quant_format=QuantFormat.QDQ,
        calibrate_method=CalibrationMethod.MinMax,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul"],
        nodes_to_exclude=[_HEAD_NODE],
        use_external_data_format=True,
        extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul"], "DedicatedQDQPair": own_pairs},
    )


def _windows(sources: Sources) -> Any:
    """Return a data reader of a few windows of the default corpus, each with an empty cache."""
    from onnxruntime.quantization import CalibrationDataReader

    from spike_export.artifacts.manifest import load_manifest
    from spike_export.calibration.corpus.corpus import default_corpus
    from spike_export.calibration.corpus.token_windows import token_windows
    from spike_export.calibration.methods.context import Calibration
    from spike_export.calibration.methods.options import CalibrationOptions

    checkpoint, manifest = sources.checkpoint, load_manifest(sources.float32)
    options = CalibrationOptions(samples=_CALIBRATION_WINDOWS, length=_CALIBRATION_TOKENS)
    windows = token_windows(default_corpus(), checkpoint.tokenizer, options.samples, options.length - 1, options.seed)
    fed = Calibration(checkpoint, windows, options).fed(windows.calibration, ())
    past = [each.name for each in manifest.inputs if each.name.startswith("past_key_values.")]
    empty = np.zeros((1, manifest.num_key_value_heads, 0, manifest.head_dim), np.float32)

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._rows = iter(fed)

        def get_next(self) -> Mapping[str, Any] | None:
            row = next(self._rows, None)
            if row is None:
                return None
            mask = np.ones((1, len(row)), np.int64)
            return {"input_ids": row[None], "attention_mask": mask, **dict.fromkeys(past, empty)}

    return Reader()


def _in_onnx_runtime(
    folder: Path, _: Sequences, __: int, open_onnx: OpenOnnx, *, off: Sequence[str] = ()
) -> tuple[Call, Call]:
    return open_onnx(folder / GRAPH, off)


def _hf_directory(sources: Sources, folder: Path) -> None:
    write_hf_directory(sources.checkpoint, folder)


def genai_model(sources: Sources, folder: Path, *, precision: str) -> None:
    """Let onnxruntime-genai's model builder quantize the weights for its CPU provider."""
    require(_GENAI, "onnxruntime-genai")
    hf = TORCH.built(sources)
    command = [sys.executable, "-m", f"{_GENAI}.models.builder"]
    done = subprocess.run(
        [*command, "-i", str(hf.absolute()), "-o", str(folder.absolute()), "-p", precision, "-e", "cpu"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
        raise UnavailableError(f"onnxruntime-genai's model builder failed: {last.strip()}")


def open_genai(folder: Path, threads: int) -> tuple[Any, Any]:
    """Return the module onnxruntime_genai, and a folder's model opened by it."""
    genai = require(_GENAI, "onnxruntime-genai")
    # As in all sessions here: threads that spin after a call would take the cores from whoever is next.
    options = {"intra_op_num_threads": threads, "session.force_spinning_stop": "1"}
    overlay = {"model": {"decoder": {"session_options": options}}}
    config = genai.Config(str(folder))
    config.overlay(json.dumps(overlay))
    return genai, genai.Model(config)


def _in_genai(folder: Path, sequences: Sequences, threads: int, _: OpenOnnx) -> tuple[Call, Call]:
    """Return calls of onnxruntime-genai's own generator, which keeps keys and values in one buffer."""
    genai, model = open_genai(folder, threads)

    def generator() -> Any:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=2 * sequences.prompt, min_length=0)
        return genai.Generator(model, parameters)

    prompt, last = sequences.tokens[:-1].astype(np.int32), sequences.tokens[-1:].astype(np.int32)
    reading, decoding = generator(), generator()
    decoding.append_tokens(prompt)

    def prefill() -> None:
        reading.rewind_to(0)
        reading.append_tokens(prompt)

    def decode() -> None:
        decoding.rewind_to(len(prompt))
        decoding.append_tokens(last)

    return prefill, decode


def cache_argument(model: Any) -> str:
    """Return what a transformers model calls its cache; transformers 5.24 renamed the argument."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


def _in_torch(folder: Path, sequences: Sequences, threads: int, _: OpenOnnx) -> tuple[Call, Call]:
    """Return calls of transformers' model in bfloat16, the cache of the decoded sequence cropped after each token."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    torch.set_num_threads(threads)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokens = torch.from_numpy(sequences.tokens[None])
    prompt, last = tokens[:, :-1], tokens[:, -1:]
    name, cache = cache_argument(model), DynamicCache()
    with torch.inference_mode():
        model(prompt, **{name: cache})

    def prefill() -> None:
        with torch.inference_mode():
            model(prompt, **{name: DynamicCache()})

    def decode() -> None:
        with torch.inference_mode():
            model(last, **{name: cache})
            cache.crop(-1)

    return prefill, decode


TORCH = Peer("torch bfloat16", "all", "hf-float32", _hf_directory, _in_torch)

PEERS = (
    Peer(
        "quantize_static",
        "all",
        "quantize-static",
        partial(_quantized_static, own_pairs=False),
        _in_onnx_runtime,
    ),
    # ONNX Runtime fuses a MatMul with a pair of its own only, and by default makes one of equal pairs: this is how the
    # tool's result becomes fast.
    Peer(
        "quantize_static, own Q/DQ pairs, CSE off",
        "all",
        "quantize-static-own-pairs",
        partial(_quantized_static, own_pairs=True),
        partial(_in_onnx_runtime, off=("CommonSubexpressionElimination",)),
    ),
    *(
        Peer(
            f"genai {precision}{where}",
            "all",
            f"genai-{precision}",
            partial(genai_model, precision=precision),
            calls,
        )
        for precision in ("int8", "int4")
        for where, calls in (("", _in_onnx_runtime), (", own runtime", _in_genai))
    ),
    TORCH,
)
