"""Peak memory and speed of calibrating a model of 7B parameters, layer by layer, on a CPU.

The weights are random, so that nothing is downloaded: neither memory nor time depends on their values. The same is
measured over half of the layers: a peak that is no lower shows that memory does not depend on the depth.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from benchmarks.peak_memory import in_own_process, peak_rss
from spike_export.artifacts.errors import CheckpointError
from spike_export.checkpoint.decoder_config import decoder_config, tensor_shapes

if TYPE_CHECKING:
    import torch

    from spike_export.artifacts.recipe import Dtype

PEAK_RSS_TARGET = 4 << 30
"""Bytes; for the shape that is the default."""

Stored = Literal["float16", "bfloat16"]

_INDEX = "model.safetensors.index.json"
_SPARE = 1 << 30
"""Bytes of the disk that stay free."""


class FolderError(Exception):
    """The model cannot be written; the message is one line that says why."""


@dataclass(frozen=True)
class Shape:
    """A LLaMA's sizes; the defaults are LLaMA-2-7B's."""

    hidden: int = 4096
    intermediate: int = 11008
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    vocab: int = 32000

    def config(self, stored: Stored) -> dict[str, Any]:
        """Return the content of `config.json`."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": stored,
        }

    def shards(self) -> list[dict[str, tuple[int, ...]]]:
        """Return tensor name → shape of each weight file: the embedding's, one per layer, the head's."""
        shapes = tensor_shapes(decoder_config(self.config("float16"), "large_model"))
        files: list[dict[str, tuple[int, ...]]] = [{} for _ in range(self.layers + 2)]
        for name, shape in shapes.items():
            parts = name.split(".")
            place = int(parts[2]) + 1 if parts[1] == "layers" else 0 if parts[1] == "embed_tokens" else -1
            files[place][name] = shape
        return files

    def stored_bytes(self) -> int:
        """Return the size of the weights at 16 bit each."""
        return sum(2 * math.prod(shape) for shard in self.shards() for shape in shard.values())


@dataclass(frozen=True)
class Load:
    """What a measurement forwards, and how.

    Attributes:
        threads: Of torch; its own choice for None.
    """

    windows: int
    length: int
    seed: int
    dtype: "Dtype"
    threads: int | None


@dataclass(frozen=True)
class Use:
    """What calibrating the first `layers` layers took.

    Attributes:
        seconds: Wall time of the pass, from the first token to the statistics.
        seconds_per_layer: Median over the layers; with reading the weights.
        tokens_per_second: Tokens forwarded, over `seconds`.
        start_rss: Peak in bytes before the pass: Python and its libraries.
        peak_rss: Bytes; of the process, which did nothing else.
    """

    layers: int
    seconds: float
    seconds_per_layer: float
    tokens_per_second: float
    start_rss: int
    peak_rss: int


def main() -> int:
    arguments = _arguments()
    shape = Shape(**{name: getattr(arguments, name) for name in Shape.__dataclass_fields__})
    load = Load(arguments.windows, arguments.length, arguments.seed, arguments.compute_dtype, arguments.threads)
    with tempfile.TemporaryDirectory(prefix="spike-export-large-") as temporary:
        folder = arguments.folder or Path(temporary)
        try:
            write_model(folder, shape, arguments.stored_dtype, arguments.seed)
        except (FolderError, CheckpointError) as error:
            print(f"large_model: {error}", file=sys.stderr)
            return 2
        before = os.getloadavg()[0]
        uses = measure(folder, shape, load)
    checkpoint_bytes = shape.stored_bytes()
    print(table(uses, checkpoint_bytes, load))
    print(f"load average {before:.1f} before and {os.getloadavg()[0]:.1f} after")
    if shape == Shape():
        verdict = "met" if uses[0].peak_rss <= PEAK_RSS_TARGET else "missed"
        print(f"target: a peak of at most {PEAK_RSS_TARGET / 1e6:.0f} MB {verdict}")
    if arguments.json is not None:
        document = {
            "shape": asdict(shape),
            "load": asdict(load),
            "checkpoint_bytes": checkpoint_bytes,
            "uses": [asdict(use) for use in uses],
        }
        arguments.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="keep the model here, and use again what is here")
    for name, field in Shape.__dataclass_fields__.items():
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=int, default=field.default, help="%(default)s by default")
    parser.add_argument("--stored-dtype", choices=get_args(Stored), default="float16", help="of the weight files")
    parser.add_argument("--compute-dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--windows", type=int, default=4, help="calibration windows of random tokens")
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    parser.add_argument("--seed", type=int, default=0, help="of weights and tokens")
    parser.add_argument("--threads", type=int, help="torch's intra-op threads; as many as cores by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    return parser.parse_args()


def write_model(folder: Path, shape: Shape, stored: Stored, seed: int) -> None:
    """Write an HF directory with random weights, one file per layer, unless the same one is there.

    Memory holds one file's tensors at a time. The index is written last: where it exists, all is complete.

    Raises:
        FolderError: The folder holds another model, or the disk has no room.
    """
    import torch
    from safetensors.torch import save_file

    config = shape.config(stored)
    shards = shape.shards()
    files = [f"model-{number + 1:05}-of-{len(shards):05}.safetensors" for number in range(len(shards))]
    index = {
        "metadata": {"total_size": shape.stored_bytes(), "seed": seed},
        "weight_map": {name: file for file, tensors in zip(files, shards, strict=True) for name in tensors},
    }
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / _INDEX).exists():
        found = [json.loads((folder / name).read_text(encoding="utf-8")) for name in ("config.json", _INDEX)]
        if found == [config, index]:
            return
        raise FolderError(f"{folder}: holds another model; give another --folder, or delete it")
    free = shutil.disk_usage(folder).free
    if free < shape.stored_bytes() + _SPARE:
        needed = (shape.stored_bytes() + _SPARE) / 1e9
        raise FolderError(
            f"{folder}: {free / 1e9:.1f} GB of disk free, {needed:.1f} GB needed; give a --folder on another disk"
        )
    _say(f"writing {shape.stored_bytes() / 1e9:.1f} GB of random weights")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    generator = torch.Generator().manual_seed(seed)
    for file, shapes in zip(files, shards, strict=True):
        save_file(_draw(shapes, stored, generator), folder / file, metadata={"format": "pt"})
    (folder / _INDEX).write_text(json.dumps(index), encoding="utf-8")


def _draw(
    shapes: Mapping[str, tuple[int, ...]], stored: Stored, generator: "torch.Generator"
) -> "dict[str, torch.Tensor]":
    """Return random tensors: norms are 1, all else is normal with LLaMA's spread of 0.02."""
    import torch

    dtype = getattr(torch, stored)
    return {
        name: torch.ones(shape, dtype=dtype)
        if len(shape) == 1
        else torch.randn(shape, generator=generator).mul_(0.02).to(dtype)
        for name, shape in shapes.items()
    }


def measure(folder: Path, shape: Shape, load: Load) -> list[Use]:
    """Calibrate all layers and then half of them, each in a process of its own."""
    uses = []
    for layers in dict.fromkeys((shape.layers, max(1, shape.layers // 2))):
        _say(f"calibrating {layers} layers")
        uses.append(in_own_process(_calibrate, folder, layers, load))
    return uses


def _calibrate(folder: Path, layers: int, load: Load) -> Use:
    """Forward random windows through the first layers and record everything; called in a process of its own."""
    import numpy as np
    import torch

    from spike_export.calibration.decoder.layerwise import Decoder, Execution
    from spike_export.calibration.statistics.measure import measure_spikes
    from spike_export.checkpoint.opening import open_checkpoint

    if load.threads is not None:
        torch.set_num_threads(load.threads)
    checkpoint = open_checkpoint(str(folder))
    vocabulary = checkpoint.config.vocab_size
    windows = np.random.default_rng(load.seed).integers(0, vocabulary, (load.windows, load.length))
    decoder = Decoder(checkpoint, Execution(dtype=load.dtype, resident=False))
    decoder.skeleton  # noqa: B018  # imports and modules are not the pass's time
    start_rss = peak_rss()
    ended: list[float] = []

    def progress(what: str, done: int, total: int) -> None:
        ended.append(time.perf_counter())
        print(f"\r{what} {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    start = time.perf_counter()
    measure_spikes(decoder, windows, layers=layers, progress=progress)
    seconds = time.perf_counter() - start
    spans = [end - begin for begin, end in zip([start, *ended[:-1]], ended, strict=True)]
    return Use(layers, seconds, statistics.median(spans), windows.size / seconds, start_rss, peak_rss())


def table(uses: Sequence[Use], checkpoint_bytes: int, load: Load) -> str:
    """Return the figures for reading."""
    lines = [
        f"{checkpoint_bytes / 1e6:.0f} MB of weights, {load.windows} windows of {load.length} tokens, {load.dtype}",
        f"{'layers':>6} {'seconds':>8} {'s/layer':>8} {'tok/s':>7} {'start RSS MB':>13} {'peak RSS MB':>12}",
    ]
    lines += [
        f"{use.layers:6} {use.seconds:8.1f} {use.seconds_per_layer:8.2f} {use.tokens_per_second:7.1f} "
        f"{use.start_rss / 1e6:13.0f} {use.peak_rss / 1e6:12.0f}"
        for use in uses
    ]
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
