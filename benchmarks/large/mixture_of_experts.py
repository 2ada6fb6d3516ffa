"""What it saves to skip the experts that no token is sent to, in ONNX Runtime on this machine's CPU.

Generated mixtures of one layer, all linears in INT8, are exported; the same bundle is run as it is and with its
branches taken away, so that every expert is computed. Both take turns, call by call, with other tokens in every call.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.large.invented_recipe import invented_recipe

if TYPE_CHECKING:
    import onnxruntime as ort

    from spike_export.checkpoint.checkpoint import Checkpoint

_WARM_UP_CALLS = 2
_VOCAB, _HEADS, _KV_HEADS, _HEAD_DIM = 1024, 8, 2, 128


@dataclass(frozen=True)
class Mixture:
    """A generated mixture's family and sizes."""

    model_type: str
    experts: int
    per_token: int
    hidden: int
    inner: int

    def config(self) -> dict[str, Any]:
        """Return the content of `config.json`."""
        return {
            "model_type": self.model_type,
            "vocab_size": _VOCAB,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "moe_intermediate_size": self.inner,
            "num_local_experts": self.experts,
            "num_experts_per_tok": self.per_token,
            "num_hidden_layers": 1,
            "num_attention_heads": _HEADS,
            "num_key_value_heads": _KV_HEADS,
            "head_dim": _HEAD_DIM,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
        }


MIXTURES: Mapping[str, Mixture] = {
    "8 experts of 3584, 2 for a token": Mixture("mixtral", 8, 2, 1024, 3584),
    "128 experts of 384, 8 for a token": Mixture("qwen3_moe", 128, 8, 1024, 384),
}
"""Mixtral-8x7B's and Qwen3-30B-A3B's ratios, in widths that fit anywhere."""

CALLS = ((1, 1), (4, 1), (1, 128))
"""Rows and new tokens of each row: decode, decode of several sequences, prefill."""


@dataclass(frozen=True)
class GeneratedTensors:
    """A `TensorSource` of random values, the same in every read."""

    shapes: Mapping[str, tuple[int, ...]]

    def read(self, name: str) -> NDArray[np.float32]:
        """Return one tensor, scaled so that activations stay of order one."""
        shape = self.shapes[name]
        values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
        return values if len(shape) == 1 else values / np.float32(shape[1] ** 0.5)

    def sha256(self) -> str:
        """Return a stand-in for a hash: nothing is stored."""
        return "generated"


def checkpoint_of(mixture: Mixture) -> "Checkpoint":
    """Return the generated checkpoint."""
    from spike_export.checkpoint.checkpoint import Checkpoint
    from spike_export.checkpoint.decoder_config import decoder_config, tensor_shapes

    config = decoder_config(mixture.config(), "generated")
    return Checkpoint("generated", config, GeneratedTensors(tensor_shapes(config)), None, {})


def sessions_of(mixture: Mixture, folder: Path, threads: int) -> "dict[str, ort.InferenceSession]":
    """Export a mixture and open it with its branches and without."""
    import onnx
    import onnxruntime as ort

    from spike_export.artifacts.manifest import GRAPH_FILE
    from spike_export.engines.onnx_runtime.session import session_options
    from spike_export.engines.plan.branches import inline_branches
    from spike_export.export.bundle import ExportOptions, export_bundle

    checkpoint = checkpoint_of(mixture)
    export_bundle(checkpoint, invented_recipe(checkpoint), ExportOptions("float32"), folder / "bundle")
    branching = folder / "bundle" / GRAPH_FILE
    flat = branching.with_name("flat.onnx")
    model = onnx.load(branching, load_external_data=False)
    inline_branches(model)
    flat.write_bytes(model.SerializeToString())
    paths = {"all experts": flat, "experts in use": branching}
    return {
        name: ort.InferenceSession(str(path), session_options(threads), providers=["CPUExecutionProvider"])
        for name, path in paths.items()
    }


def measure(sessions: "dict[str, ort.InferenceSession]", rows: int, new: int, calls: int) -> dict[str, list[float]]:
    """Return the seconds of every call."""
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    random = np.random.default_rng(0)
    for turn in range(-_WARM_UP_CALLS, calls):
        ids = random.integers(0, _VOCAB, (rows, new))
        feeds: dict[str, NDArray[Any]] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        empty = np.zeros((rows, _KV_HEADS, 0, _HEAD_DIM), np.float32)
        feeds |= {f"past_key_values.0.{kind}": empty for kind in ("key", "value")}
        names = list(sessions) if turn % 2 else list(reversed(sessions))
        for name in names:
            start = time.perf_counter()
            sessions[name].run(None, feeds)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="intra-op threads of each session")
    parser.add_argument("--calls", type=int, default=21, help="calls of each kind")
    arguments = parser.parse_args()
    before = os.getloadavg()[0]
    print("| mixture | rows x tokens | all experts, ms: median (least) | experts in use, ms | ratio of the medians |")
    print("|---|---|---|---|---|")
    for name, mixture in MIXTURES.items():
        with tempfile.TemporaryDirectory(prefix="spike-export-mixture-") as temporary:
            sessions = sessions_of(mixture, Path(temporary), arguments.threads)
        for rows, new in CALLS:
            found = measure(sessions, rows, new, arguments.calls)
            medians = {each: 1e3 * statistics.median(seconds) for each, seconds in found.items()}
            cells = [f"{medians[each]:.2f} ({1e3 * min(seconds):.2f})" for each, seconds in found.items()]
            ratio = medians["all experts"] / medians["experts in use"]
            print(f"| {name} | {rows} x {new} | {cells[0]} | {cells[1]} | {ratio:.2f} |", flush=True)
    print(f"{arguments.threads} threads, load average {before:.1f} before and {os.getloadavg()[0]:.1f} after")
    return 0


if __name__ == "__main__":
    sys.exit(main())
