"""SmolLM2 generates what transformers' `generate` does, token for token, over either cache."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spike_export.checkpoint.checkpoint import EMBEDDING, Checkpoint
from spike_export.checkpoint.opening import open_checkpoint
from spike_export.engines.engine import Engine
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.cache_options import CacheOptions

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
    """transformers' own model with the file's weights."""
    model = LlamaForCausalLM(LlamaConfig(**{**checkpoint.config.hf, "dtype": "float32"}))
    tensors = {name: torch.from_numpy(checkpoint.tensors.read(name)) for name in checkpoint.tensors.shapes}
    tensors.setdefault("lm_head.weight", tensors[EMBEDDING])
    model.load_state_dict(tensors, assign=True)
    return model.eval()


@pytest.fixture(scope="module", params=["dynamic", "static"])
def engine(request: pytest.FixtureRequest, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    cache = CacheOptions("static", 128) if request.param == "static" else CacheOptions()
    bundle = tmp_path_factory.mktemp("generation") / request.param
    export_bundle(checkpoint, None, ExportOptions("float32", cache=cache), bundle)
    return Engine.open(bundle, threads=1)


@pytest.fixture(scope="module")
def expected(reference: Any, checkpoint: Checkpoint) -> list[tuple[str, list[int]]]:
    """Per prompt the text and the tokens that transformers adds to it, each prompt alone."""
    tokenizer, bos, results = checkpoint.tokenizer, checkpoint.bos_token_id, []
    assert tokenizer is not None
    for prompt in PROMPTS:
        ids = torch.tensor([[bos, *tokenizer.encode(prompt, add_special_tokens=False)]])
        with torch.inference_mode():
            whole = reference.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
            )
        tokens = whole[0, ids.shape[1] :].tolist()
        results.append((tokenizer.decode(tokens, skip_special_tokens=True), tokens))
    return results


def test_greedy_tokens_and_text_are_transformers(engine: Engine, expected: list[tuple[str, list[int]]]) -> None:
    """20 prompts of different lengths in one batch."""
    results = engine.generate(PROMPTS, max_new_tokens=NEW_TOKENS)
    for prompt, result, (text, tokens) in zip(PROMPTS, results, expected, strict=True):
        assert list(result.token_ids) == tokens, prompt
        assert result.text == text, prompt
    assert len({result.token_ids for result in results}) == len(PROMPTS)


def test_a_sampled_row_is_as_it_is_alone(engine: Engine) -> None:
    options = {"max_new_tokens": 6, "do_sample": True, "temperature": 0.9, "top_p": 0.95}
    rows = engine.generate(PROMPTS[:3], seed=5, **options)
    for row, prompt in enumerate(PROMPTS[:3]):
        assert engine.generate(prompt, seed=5 + row, **options)[0].token_ids == rows[row].token_ids
    assert np.unique([row.finish_reason for row in rows]).tolist() == ["length"]
