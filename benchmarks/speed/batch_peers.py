"""Other tools' whole batches in this process, ready to take turns with this project's bundles.

onnxruntime-genai with INT8 and INT4 weights, CTranslate2 in INT8, openvino-genai on the GGUF file, and torch in
bfloat16. Each goes on with the most likely token, also behind an end of text.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.speed.peers import (
    TORCH,
    Sources,
    UnavailableError,
    cache_argument,
    genai_model,
    kept_artefact,
    open_genai,
    require,
)

Lengths = Literal["own", "padded", "equal"]
"""How a batch holds rows of different lengths: as they are, padded on the left to the longest, or not at all."""

_PADDING = 2
"""Token that stands in front of shorter rows; a mask hides it."""

_ALL_TOKENS = 1 << 16
"""More tokens than any batch has: the prompts of all rows are read in one step."""


@dataclass(frozen=True)
class Played:
    """One batch, from its prompts to its last tokens.

    Attributes:
        prompts: Seconds until each row has its first token.
        steps: Seconds of the steps that are counted; the one behind the prompts is not.
        tokens: [rows, steps + 2] What each row went on with: from the prompt, the first step, and the counted ones.
    """

    prompts: float
    steps: float
    tokens: NDArray[np.int64]


Play = Callable[[Sequence[NDArray[np.int64]], int], Played]
"""(prompts, a row each, and how many steps to count) → what was measured."""


def timed(read: Callable[[], object], step: Callable[[], object], steps: int) -> tuple[float, float]:
    """Return the seconds of reading the prompts, and of the steps behind one that is not counted."""
    start = time.perf_counter()
    read()
    read_at = time.perf_counter()
    step()
    first = time.perf_counter()
    for _ in range(steps):
        step()
    return read_at - start, time.perf_counter() - first


@dataclass(frozen=True)
class BatchPeer:
    """One other way to run a batch.

    Attributes:
        lengths: How its batch holds rows of different lengths.
        artefact: Folder name; the single-row table keeps its artefacts under the same names.
        build: Writes the artefact into a folder.
        open: (folder, threads) → what plays batches.
    """

    name: str
    lengths: Lengths
    artefact: str
    build: Callable[[Sources, Path], None]
    open: Callable[[Path, int], Play]

    def built(self, sources: Sources) -> Path:
        """Return the artefact's folder; it is built where it is not there yet.

        Raises:
            UnavailableError: A package is missing, or the peer's own tool fails.
        """
        return kept_artefact(sources, self.artefact, self.build)


def _padded(prompts: Sequence[NDArray[np.int64]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return [rows, longest] tokens, padded on the left, and the mask that hides the padding."""
    longest = max(map(len, prompts))
    tokens = np.stack([np.pad(prompt, (longest - len(prompt), 0), constant_values=_PADDING) for prompt in prompts])
    mask = np.stack([np.repeat((0, 1), (longest - len(prompt), len(prompt))) for prompt in prompts])
    return tokens, mask


def _in_genai(folder: Path, threads: int) -> Play:
    """Play batches in onnxruntime-genai's generator; what it samples from the prompts' logits counts to the prompts."""
    genai, model = open_genai(folder, threads)

    def play(prompts: Sequence[NDArray[np.int64]], steps: int) -> Played:
        tokens = np.stack(prompts).astype(np.int32)
        parameters = genai.GeneratorParams(model)
        length = tokens.shape[1] + steps + 2
        # Below its least length a sequence does not end.
        parameters.set_search_options(
            batch_size=len(prompts), max_length=length, min_length=length, do_sample=False, num_beams=1
        )
        generator = genai.Generator(model, parameters)

        def read() -> None:
            generator.append_tokens(tokens)
            generator.generate_next_token()

        seconds = timed(read, generator.generate_next_token, steps)
        rows = [generator.get_sequence(row)[-steps - 2 :] for row in range(len(prompts))]
        return Played(*seconds, np.array(rows, np.int64))

    return play


def _ctranslate2_model(sources: Sources, folder: Path) -> None:
    converters: Any = require("ctranslate2.converters", "ctranslate2")
    converters.TransformersConverter(str(TORCH.built(sources))).convert(str(folder), quantization="int8", force=True)


def _in_ctranslate2(folder: Path, threads: int) -> Play:
    """Play batches in CTranslate2's generator, which tells of each token of each row when it has it."""
    ctranslate2 = require("ctranslate2", "ctranslate2")
    generator = ctranslate2.Generator(
        str(folder), device="cpu", compute_type="int8", inter_threads=1, intra_threads=threads
    )
    names = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))

    def play(prompts: Sequence[NDArray[np.int64]], steps: int) -> Played:
        fed = [[names[token] for token in prompt] for prompt in prompts]
        times: list[float] = []

        def told(_: object) -> bool:
            times.append(time.perf_counter())
            return False

        start = time.perf_counter()
        results = generator.generate_batch(
            fed,
            max_length=steps + 2,
            min_length=steps + 2,
            beam_size=1,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=told,
        )
        read, first, *_, last = times[len(fed) - 1 :: len(fed)]
        return Played(read - start, last - first, np.array([result.sequences_ids[0] for result in results]))

    return play


def _gguf(sources: Sources, folder: Path) -> None:
    if sources.gguf is None:
        raise UnavailableError("openvino-genai reads a GGUF file here, and the model is none")
    (folder / "model.gguf").symlink_to(sources.gguf.absolute())


def _in_openvino(folder: Path, threads: int) -> Play:
    """Play batches in openvino-genai's pipeline of paged attention, step by step, without its cache of prefixes."""
    genai: Any = require("openvino_genai", "openvino-genai")
    openvino: Any = require("openvino", "openvino")
    scheduler = genai.SchedulerConfig()
    scheduler.max_num_batched_tokens = _ALL_TOKENS
    scheduler.enable_prefix_caching = False
    pipeline = genai.ContinuousBatchingPipeline(
        str(folder / "model.gguf"), scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads}
    )
    requests = count()

    def play(prompts: Sequence[NDArray[np.int64]], steps: int) -> Played:
        options = genai.GenerationConfig(max_new_tokens=steps + 2, ignore_eos=True, do_sample=False)
        handles = [
            pipeline.add_request(next(requests), openvino.Tensor(prompt[None].copy()), options) for prompt in prompts
        ]
        seconds = timed(pipeline.step, pipeline.step, steps)
        if pipeline.has_non_finished_requests():
            raise UnavailableError("openvino-genai took more steps than tokens")
        return Played(*seconds, np.array([handle.read_all()[0].generated_ids for handle in handles], np.int64))

    return play


def play_in_torch(folder: Path, threads: int, *, dtype: str = "bfloat16") -> Play:
    """Return what plays batches in transformers' model."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    torch.set_num_threads(threads)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    name = cache_argument(model)

    def play(prompts: Sequence[NDArray[np.int64]], steps: int) -> Played:
        fed, shown = map(torch.from_numpy, _padded(prompts))
        cache, tokens = DynamicCache(), []

        def step() -> None:
            nonlocal fed, shown
            # A row's first token has position 0, whatever stands in front of it.
            positions = (shown.cumsum(1) - 1).clamp(min=0)[:, -fed.shape[1] :]
            given = {"attention_mask": shown, "position_ids": positions, "logits_to_keep": 1, name: cache}
            with torch.inference_mode():
                fed = model(fed, **given).logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(fed)
            shown = torch.cat([shown, torch.ones_like(fed)], 1)

        seconds = timed(step, step, steps)
        return Played(*seconds, torch.cat(tokens, 1).numpy())

    return play


PEERS = (
    # Its generator takes one array of tokens; batches with padding were not tried.
    *(
        BatchPeer(
            f"genai {precision}", "equal", f"genai-{precision}", partial(genai_model, precision=precision), _in_genai
        )
        for precision in ("int8", "int4")
    ),
    # Rows of different lengths are read together up to the shortest, and from there token by token.
    BatchPeer("ctranslate2 int8", "equal", "ctranslate2-int8", _ctranslate2_model, _in_ctranslate2),
    BatchPeer("openvino-genai, GGUF", "own", "gguf", _gguf, _in_openvino),
    BatchPeer("torch bfloat16", "padded", TORCH.artefact, TORCH.build, play_in_torch),
)
