"""The checkpoint in a real vLLM server: `VLLM=COMMAND pytest --slow tests/export/compressed_tensors/test_vllm.py`.

COMMAND is vLLM's own, `path/to/vllm`, of an environment of its own; docs/vllm.md tells how to make one. The server is
held against the definition of the format, and the definition against the bundle in test_written_model.py: the weights
have seven bits here, because vLLM's INT8 products saturate on a processor without VNNI.
"""

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from openai import OpenAI
from safetensors.torch import load_file, save_file

from benchmarks.accuracy.compressed_reading import computed_model
from benchmarks.accuracy.served_checkpoint import Served, served_perplexity
from benchmarks.accuracy.written_checkpoint import perplexity
from spike_export.artifacts.recipe import Prefix
from spike_export.checkpoint.opening import open_checkpoint
from spike_export.export.compressed_tensors.checkpoint_export import write_checkpoint
from tests.export.compressed_tensors.test_written_model import PREFIX, recipe_of
from tests.serving.triton.test_server import free_ports
from tests.support.decoder_logits import whole_logits
from tests.support.tiny.checkpoints import planted_spike_llama, sampled_text, write_hf

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("VLLM" not in os.environ, reason="needs vLLM in an environment of its own: VLLM=COMMAND"),
]

MODEL = planted_spike_llama(head_dim=32)
"""vLLM's attention on processors takes no smaller heads."""

SECONDS = 400
"""A start of vLLM on two busy processors takes minutes."""


@pytest.fixture(scope="module")
def content() -> NDArray[np.int64]:
    return sampled_text(MODEL, lines=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, content: NDArray[np.int64]) -> Path:
    """A checkpoint, static and per-token inputs mixed."""
    place = tmp_path_factory.mktemp("vllm")
    model = open_checkpoint(str(write_hf(place / "model", MODEL)))
    recipe = recipe_of(model, content, PREFIX)
    recipe = recipe.model_copy(update={"prefix": Prefix(token_ids=PREFIX, text="?", ratio=1.0)})
    assert write_checkpoint(model, recipe, "float32", place / "checkpoint").exceeded
    leave_seven_bits(place / "checkpoint" / "model.safetensors")
    return place / "checkpoint"


def leave_seven_bits(file: Path) -> None:
    """Halve the INT8 weights, and double their scales."""
    state = load_file(file)
    for name in [name for name in state if name.endswith(".weight_scale")]:
        weight = name.removesuffix("_scale")
        state[weight] = torch.round(state[weight].float() / 2).clamp(-63, 63).to(torch.int8)
        state[name] = 2 * state[name]
    save_file(state, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    (port,) = free_ports(1)
    options = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "4")
    place = ("--host", "127.0.0.1", "--port", str(port))
    command = [*shlex.split(os.environ["VLLM"]), "serve", str(folder), *options, *place]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"} | os.environ
    with (folder.parent / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        wait_until_ready(f"http://127.0.0.1:{port}", server, folder.parent / "log")
        yield Served.at(f"http://127.0.0.1:{port}")
    finally:
        os.killpg(server.pid, signal.SIGTERM)  # its engine is a process of its own
        server.wait(60)


def wait_until_ready(url: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            if httpx2.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx2.HTTPError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])


def test_its_perplexity_is_that_of_the_formats_definition(
    served: Served, folder: Path, content: NDArray[np.int64]
) -> None:
    full = np.concatenate([np.tile(np.array(PREFIX), (len(content), 1)), content], axis=1)
    defined = perplexity(whole_logits(computed_model(folder), full), content)
    # Inputs that two orders of summation round to different steps are all that is left.
    assert served_perplexity(served, PREFIX, content) == pytest.approx(defined, rel=2e-3)
    # Behind BOS alone the planted spike is the content's.
    assert served_perplexity(served, PREFIX[:1], content) != pytest.approx(defined, rel=1e-2)


def test_it_generates_what_the_format_defines(served: Served, folder: Path) -> None:
    length, given = 12, [*PREFIX, 40, 41, 42]
    tokens = served.completion(given, max_tokens=length, return_token_ids=True, ignore_eos=True)["token_ids"]
    assert len(tokens) == length
    logits = whole_logits(computed_model(folder), np.array([given + tokens[:-1]]))[0, len(given) - 1 :]
    best, drawn = logits.amax(-1), logits[range(length), tokens]
    assert ((best - drawn) / logits.abs().max()).max() < 0.02  # one rounding step where two sums straddle it


def test_its_openai_server_puts_the_prefix_in_front(served: Served) -> None:
    client = OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60)
    answer = client.completions.create(model=served.name, prompt="ab cd", max_tokens=4, temperature=0)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(PREFIX) + len("ab cd")
    alike = served.completion([*PREFIX, *(letter + 2 for letter in b"ab cd")], max_tokens=4)
    assert answer.choices[0].text == alike["text"]
