"""Bundles in onnxruntime-genai, which allocates the cache and feeds tokens by itself."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spike_export.artifacts.recipe import Dtype
from spike_export.checkpoint.opening import open_checkpoint
from spike_export.engines.onnx_runtime.exact_products import EXACT_PRODUCTS, products_saturate
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.files.model_files import genai_config
from spike_export.export.graph_plan import PrefixHome
from tests.support.reference_models import most_likely, reference_model
from tests.support.tiny.models import CachedSession, TinyModel, input_scales, tiny_llama, tiny_recipe

og = pytest.importorskip("onnxruntime_genai", reason="the extra `genai` (onnxruntime-genai) is not installed")

pytestmark = pytest.mark.usefixtures("denormals_as_before")

PROMPTS = ([5, 6, 7], [60], [9, 8, 44, 3, 21, 90, 17])
NEW = 12


def greedy(bundle: Path, prompt: list[int]) -> list[int]:
    """Tokens that onnxruntime-genai appends to a bundle's prompt."""
    config = og.Config(str(bundle))
    if products_saturate():
        options = {EXACT_PRODUCTS: "1"}  # as docs/decisions/exact-products.md tells the user of such a processor
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    return genai_greedy(og.Model(config), prompt)


def genai_greedy(model: Any, prompt: list[int], new: int = NEW) -> list[int]:
    """Tokens that onnxruntime-genai appends."""
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=len(prompt) + new)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array(prompt, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(prompt) :]


def reference_greedy(model: Any, prompt: list[int], eos: tuple[int, ...]) -> list[int]:
    """Tokens that transformers' model appends."""
    ids = torch.tensor([prompt])
    sequence = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, eos_token_id=list(eos)
    )
    return [int(token) for token in sequence[0, len(prompt) :]]


def session_greedy(session: CachedSession, prompt: list[int]) -> list[int]:
    """Tokens that ONNX Runtime's plain session appends."""
    tokens = list(prompt)
    for _ in range(NEW):
        tokens.append(int(session.run(np.array([tokens]))[0, -1].argmax()))
        if tokens[-1] == 2:
            break
    return tokens[len(prompt) :]


@pytest.mark.parametrize("window", [None, 4], ids=["llama", "mistral"])
def test_greedy_text_is_transformers(tmp_path: Path, window: int | None) -> None:
    model = tiny_llama(sliding_window=window)
    export_bundle(model.checkpoint, None, ExportOptions("float32"), tmp_path / "b")
    for prompt in PROMPTS:
        expected = reference_greedy(model.reference, prompt, model.checkpoint.config.eos_token_ids)
        assert greedy(tmp_path / "b", prompt) == expected


def quantized(folder: Path, model: TinyModel, prefix_in: PrefixHome, dtype: Dtype = "float32") -> Path:
    recipe = tiny_recipe(model.checkpoint, input_scales(model, np.array(PROMPTS[2:])), prefix=(1, 7))
    export_bundle(model.checkpoint, recipe, ExportOptions(dtype, prefix_in=prefix_in), folder)
    return folder


def test_a_prefix_in_attention_runs(tmp_path: Path) -> None:
    model = tiny_llama()
    cached = CachedSession(quantized(tmp_path / "cached", model, "cache"))
    bundle = quantized(tmp_path / "attached", model, "attention")
    for prompt in PROMPTS:
        assert greedy(bundle, prompt) == session_greedy(cached, prompt)


def test_float16_runs(tmp_path: Path) -> None:
    assert greedy(quantized(tmp_path / "b", tiny_llama(), "attention", "float16"), PROMPTS[0])


def test_a_prefix_in_the_cache_is_refused_with_the_reason(tmp_path: Path) -> None:
    """Not too much is refused: with a type that it accepts, onnxruntime-genai does fail over `present`."""
    model = tiny_llama()
    bundle = quantized(tmp_path / "b", model, "cache")
    with pytest.raises(RuntimeError, match="export with --prefix-in attention"):
        og.Model(str(bundle))
    (bundle / "genai_config.json").write_text(json.dumps(genai_config(model.checkpoint, None)))
    with pytest.raises(RuntimeError, match=r"present\.0\.(key|value)"):
        greedy(bundle, PROMPTS[0])


@pytest.mark.model
def test_smollm2_says_what_transformers_says(tmp_path: Path, smollm2: Path) -> None:
    checkpoint = open_checkpoint(str(smollm2))
    export_bundle(checkpoint, None, ExportOptions("float32"), tmp_path / "b")
    model = og.Model(str(tmp_path / "b"))
    tokenizer = og.Tokenizer(model)
    reference = reference_model(checkpoint)
    assert checkpoint.tokenizer is not None
    for text in ("The capital of France is", "def fibonacci(n):", "Water boils at"):
        prompt = checkpoint.tokenizer(text)["input_ids"]
        assert list(tokenizer.encode(text)) == prompt
        said = genai_greedy(model, prompt, 16)
        assert most_likely(reference, prompt, said)[:-1] == said
        assert len(said) == 16
