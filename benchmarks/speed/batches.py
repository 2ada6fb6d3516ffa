"""Tokens per second of whole batches: bundles of one model side by side, in turns, at several numbers of rows.

Rows have half to one and a half times as many tokens in front as `--context` says, as sequences of a server have. A
round reads the prompts, a bundle row by row, and then decodes all rows together. The first bundle is what others are
compared to. `--peers` adds other tools with a batch in one process, as far as they are installed: onnxruntime-genai,
ctranslate2, openvino-genai (`pip install ctranslate2 openvino openvino-genai openvino-tokenizers`) and torch. The table
says which of them have rows of equal length instead, or padding, which they compute and which is not counted.

Run: python -m benchmarks.speed.batches FP32_BUNDLE BUNDLE [MORE ...] [--peers]; of bundles with a static cache.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from benchmarks.fetch_models import smollm2_path
from benchmarks.speed.batch_peers import PEERS, Lengths, Play, Played, timed
from benchmarks.speed.kept_bundles import require_model
from benchmarks.speed.peers import Sources, UnavailableError, failures_told
from benchmarks.speed.table import PAUSE_SECONDS
from spike_export.checkpoint.opening import open_checkpoint
from spike_export.engines.onnx_runtime.sequences import StaticSequences
from spike_export.engines.onnx_runtime.session import BundleSession, open_for_generation

_ORDINARY = 3
"""First token that no tokenizer here pads or ends with."""

_ABOUT: dict[Lengths, str] = {"own": "", "padded": ", padded", "equal": ", equal lengths"}
"""What the table says of how a leg holds rows of different lengths."""


@dataclass
class Rates:
    """Tokens per second of one leg at one number of rows, one of each round."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Leg:
    """A bundle or a peer, opened.

    Attributes:
        lengths: How it holds rows of different lengths.
    """

    name: str
    lengths: Lengths
    play: Play


def lengths(rows: int, context: int) -> list[int]:
    """Return tokens in front of each row: half to one and a half times the context, evenly."""
    return [round(context * share) for share in np.linspace(0.5, 1.5, rows)] if rows > 1 else [context]


def prompts(leg: Leg, rows: int, context: int, vocabulary: int) -> list[NDArray[np.int64]]:
    """Return random prompts as a leg can hold them; about the same number of tokens for each leg."""
    random = np.random.default_rng(0)
    found = [context] * rows if leg.lengths == "equal" else lengths(rows, context)
    return [random.integers(_ORDINARY, vocabulary, length) for length in found]


def play_bundle(session: BundleSession, prompts: Sequence[NDArray[np.int64]], steps: int) -> Played:
    """Read a prompt into each row, then decode all of them together."""
    batch = session.begin(len(prompts))
    assert isinstance(batch, StaticSequences), "a bundle with a static cache"
    tokens: list[NDArray[np.int64]] = []

    def read() -> None:
        logits = [batch.admit(row, prompt)[0, -1] for row, prompt in enumerate(prompts)]
        tokens.append(np.argmax(logits, axis=1)[:, None])

    def step() -> None:
        tokens.append(np.argmax(batch.step(tokens[-1])[:, -1], axis=1)[:, None])

    return Played(*timed(read, step, steps), np.concatenate(tokens, axis=1))


def peer_legs(sources: Sources, threads: int) -> list[Leg]:
    """Return the peers that are there and can play a batch of two rows; say of the others why they are left out."""
    legs = []
    for peer in PEERS:
        try:
            with failures_told():
                leg = Leg(peer.name, peer.lengths, peer.open(peer.built(sources), threads))
                measure(leg, 2, 16, sources.checkpoint.config.vocab_size, 2, Rates())
            legs.append(leg)
        except UnavailableError as error:
            print(f"{peer.name} is left out: {error}", flush=True)
    return legs


def measure(leg: Leg, rows: int, context: int, vocabulary: int, steps: int, rates: Rates) -> None:
    """Play one round; the first step is not counted.

    Raises:
        UnavailableError: The leg gave more or fewer tokens than were asked for.
    """
    given = prompts(leg, rows, context, vocabulary)
    played = leg.play(given, steps)
    if played.tokens.shape != (rows, steps + 2):
        raise UnavailableError(f"{leg.name}: {played.tokens.shape} tokens, and not {(rows, steps + 2)}")
    rates.prefill.append(sum(map(len, given)) / played.prompts)
    rates.decode.append(rows * steps / played.steps)


def spread(values: Sequence[float]) -> str:
    """Return the median, and the range behind it."""
    return f"{median(values):7.1f} ({min(values):.0f} to {max(values):.0f})"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path, nargs="+", help="folder that export wrote with --kv-cache static")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="tokens of each row in a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", action="store_true", help="measure other tools too, on SmolLM2-135M-Instruct")
    parser.add_argument(
        "--weights-copy", action="store_true", help="measure each bundle with a copy of its weights too"
    )
    parser.add_argument("--artefacts", type=Path, help="keep the peers' models here, and use again what is here")
    given = parser.parse_args(arguments)
    sessions = [(path.name, open_for_generation(path, given.threads)) for path in given.bundle]
    if given.weights_copy:
        copied = (open_for_generation(path, given.threads, weights_copy="auto") for path in given.bundle)
        sessions += [(f"{name}, copy", session) for (name, _), session in zip(sessions, copied, strict=True)]
    legs = [Leg(name, "own", partial(play_bundle, session)) for name, session in sessions]
    vocabulary = sessions[0][1].manifest.vocab_size
    with tempfile.TemporaryDirectory(prefix="spike-export-peers-") as scratch:
        if given.peers:
            model = smollm2_path()
            checkpoint = open_checkpoint(str(model))
            require_model(given.bundle, checkpoint)
            kept = given.artefacts or Path(scratch)
            kept.mkdir(parents=True, exist_ok=True)
            legs += peer_legs(Sources(lambda: checkpoint, given.bundle[0], kept, model), given.threads)
        print("rows | leg | decode, tokens/s | x | prefill, tokens/s | x")
        for rows in given.rows:
            measured = [Rates() for _ in legs]
            for turn in range(given.rounds):
                # Nobody is always behind the same one, whose threads may still look for work.
                for leg, rates in list(zip(legs, measured, strict=True))[:: 1 if turn % 2 == 0 else -1]:
                    time.sleep(PAUSE_SECONDS)
                    measure(leg, rows, given.context, vocabulary, given.steps, rates)
            for leg, rates in zip(legs, measured, strict=True):
                decode, prefill = (
                    median(getattr(rates, kind)) / median(getattr(measured[0], kind)) for kind in ("decode", "prefill")
                )
                print(
                    f"{rows:4} | {leg.name}{_ABOUT[leg.lengths]} | {spread(rates.decode)} | {decode:.2f} | "
                    f"{spread(rates.prefill)} | {prefill:.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
