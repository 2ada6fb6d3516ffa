"""SmolLM2 generates what transformers does greedily, token for token, over either cache."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.checkpoint.opening import open_checkpoint
from spike_export.engines.engine import Engine
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.cache_options import CacheOptions
from tests.support.reference_models import most_likely, reference_model

pytestmark = [pytest.mark.model, pytest.mark.usefixtures("one_thread")]

NEW_TOKENS = 7

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time, in a small village",
    "def fibonacci(n):\n",
    "The three primary colours are",
    "To be, or not to be,",
    "1, 2, 3, 4,",
    "Dear Sir or Madam,\n\n",
    "Photosynthesis is the process by which",
    "# Shopping list\n-",
    "She opened the door and",
    "In 1969, the first",
    "The opposite of hot is",
    "import numpy as np\n\nx = np.",
    "Caf\u00e9 au lait est",
    "Q: Who wrote Hamlet?\nA:",
    "The mitochondria",
    "If it rains tomorrow, we will",
    "SELECT name FROM users WHERE",
    "\u4f60\u597d",
)


@pytest.fixture(scope="module")
def checkpoint(smollm2: Path) -> Checkpoint:
    return open_checkpoint(str(smollm2))


@pytest.fixture(scope="module")
def reference(checkpoint: Checkpoint) -> Any:
    return reference_model(checkpoint)


@pytest.fixture(scope="module", params=["dynamic", "static"])
def engine(request: pytest.FixtureRequest, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    kind = CacheOptions("static", 128) if request.param == "static" else CacheOptions()
    bundle = tmp_path_factory.mktemp("generation") / request.param
    export_bundle(checkpoint, None, ExportOptions("float32", cache=kind), bundle)
    return Engine.open(bundle, threads=1)


@pytest.fixture(scope="module")
def prompts(checkpoint: Checkpoint) -> list[list[int]]:
    """Token ids of the prompts."""
    tokenizer, bos = checkpoint.tokenizer, checkpoint.bos_token_id
    assert tokenizer is not None
    assert bos is not None
    return [[bos, *tokenizer.encode(prompt, add_special_tokens=False)] for prompt in PROMPTS]


def generated(model: Any, prompt: list[int]) -> list[int]:
    """Return the tokens that transformers' `generate` appends to a prompt."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )
    tokens: list[int] = whole[0, len(prompt) :].tolist()
    return tokens


@pytest.fixture(scope="module")
def likely(reference: Any, prompts: list[list[int]]) -> Callable[[int, tuple[int, ...]], list[int]]:
    """Tells what transformers' model follows a prompt with, and each token of a continuation; once for both caches."""
    return cache(lambda place, continuation: most_likely(reference, prompts[place], continuation))


def test_greedy_tokens_and_text_are_transformers(
    engine: Engine,
    reference: Any,
    checkpoint: Checkpoint,
    prompts: list[list[int]],
    likely: Callable[[int, tuple[int, ...]], list[int]],
) -> None:
    """20 prompts of different lengths in one batch."""
    results = engine.generate(PROMPTS, max_new_tokens=NEW_TOKENS)
    assert checkpoint.tokenizer is not None
    for place, (prompt, result) in enumerate(zip(PROMPTS, results, strict=True)):
        assert len(result.token_ids) == NEW_TOKENS, prompt
        assert likely(place, result.token_ids)[:-1] == list(result.token_ids), prompt
        assert result.text == checkpoint.tokenizer.decode(result.token_ids, skip_special_tokens=True), prompt
    assert len({result.token_ids for result in results}) == len(PROMPTS)
    assert generated(reference, prompts[0]) == list(results[0].token_ids)


def test_texts_and_chats_are_fed_as_transformers_would(engine: Engine, checkpoint: Checkpoint) -> None:
    theirs: Any = checkpoint.tokenizer
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2 <= \u00fc?\n"}]
    for messages in (chat, chat[1:]):
        wanted = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert engine.tokenizer.render(messages, [], asks=True) == wanted
        assert engine.tokenizer.encode(wanted, add_special_tokens=False) == theirs.encode(
            wanted, add_special_tokens=False
        )
    for prompt in PROMPTS:
        assert engine.tokenizer.encode(prompt) == theirs.encode(prompt)


def test_a_sampled_row_is_as_it_is_alone(engine: Engine) -> None:
    options = {"max_new_tokens": 6, "do_sample": True, "temperature": 0.9, "top_p": 0.95}
    rows = engine.generate(PROMPTS[:3], seed=5, **options)
    for row, prompt in enumerate(PROMPTS[:3]):
        assert engine.generate(prompt, seed=5 + row, **options)[0].token_ids == rows[row].token_ids
    assert np.unique([row.finish_reason for row in rows]).tolist() == ["length"]
