"""Perplexity of a checkpoint as vLLM serves it, beside the perplexity of the bundle of the same recipe in ONNX Runtime.

The server is asked through its OpenAI API for the log-probability of each token of a prompt (`prompt_logprobs`). A
prompt is the bundle's prefix, as token ids, and a window of the help topics.
Run: python -m benchmarks.accuracy.served_checkpoint URL BUNDLE [--model PATH] [--windows N] [--length N]
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from numpy.typing import NDArray

from benchmarks.accuracy.written_checkpoint import CONTENT
from benchmarks.fetch_models import smollm2_path
from spike_export.artifacts.manifest import load_manifest
from spike_export.calibration.corpus.corpus import default_corpus
from spike_export.calibration.corpus.token_windows import windows_throughout
from spike_export.calibration.decoder.perplexity import Likelihood, total
from spike_export.checkpoint.opening import open_checkpoint
from spike_export.engines.accuracy.predictions import log_softmax
from spike_export.engines.onnx_runtime.session import open_bundle

_TIMEOUT = 300.0


@dataclass(frozen=True)
class Served:
    """A model of a server that runs."""

    url: str
    name: str

    @classmethod
    def at(cls, url: str) -> "Served":
        """Return the first model of a server."""
        answer = httpx2.get(f"{url}/v1/models", timeout=_TIMEOUT)
        answer.raise_for_status()
        return cls(url, answer.json()["data"][0]["id"])

    def completion(self, prompt: str | Sequence[int], **options: Any) -> dict[str, Any]:
        """Return the only choice of a completion, without randomness."""
        body = {"model": self.name, "prompt": prompt, "temperature": 0} | options
        answer = httpx2.post(f"{self.url}/v1/completions", json=body, timeout=_TIMEOUT)
        answer.raise_for_status()
        choice: dict[str, Any] = answer.json()["choices"][0]
        return choice

    def likelihood(self, prefix: Sequence[int], content: NDArray[np.int64]) -> Likelihood:
        """Return how the server predicts a window's tokens [tokens] but for the first one."""
        prompt = [*prefix, *content.tolist()]
        found = self.completion(prompt, max_tokens=1, prompt_logprobs=0)["prompt_logprobs"]
        scored = range(len(prefix) + 1, len(prompt))
        return Likelihood(-math.fsum(found[place][str(prompt[place])]["logprob"] for place in scored), len(scored))


def served_perplexity(served: Served, prefix: Sequence[int], content: NDArray[np.int64]) -> float:
    """Return the perplexity of windows [windows, tokens] behind a prefix."""
    return total(served.likelihood(prefix, window) for window in content).perplexity


def bundle_perplexity(bundle: Path, content: NDArray[np.int64]) -> float:
    """Return the perplexity of windows [windows, tokens] behind the bundle's own prefix."""
    session = open_bundle(bundle, all_logits=True)

    def likelihood(window: NDArray[np.int64]) -> Likelihood:
        logs = log_softmax(session.prefill(window[None])[0, :-1])
        return Likelihood(-float(np.take_along_axis(logs, window[1:, None], axis=1).sum()), len(window) - 1)

    return total(likelihood(window) for window in content).perplexity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of a server that runs, without /v1")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--model", help="the recipe's model; SmolLM2 by default")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=CONTENT)
    options = parser.parse_args()
    checkpoint, prefix = open_checkpoint(options.model or str(smollm2_path())), load_manifest(options.bundle).prefix
    corpus, bos = default_corpus(), checkpoint.bos_token_id
    content = windows_throughout(corpus, checkpoint.tokenizer, options.windows, options.length, bos).calibration
    before = prefix.token_ids if prefix else () if bos is None else (bos,)
    ours = bundle_perplexity(options.bundle, content)
    served = served_perplexity(Served.at(options.url), before, content)
    print(f"bundle {ours:.4f}, served {served:.4f}: {served / ours - 1:+.2%}")


if __name__ == "__main__":
    main()
