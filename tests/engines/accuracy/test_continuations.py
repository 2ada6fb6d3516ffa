"""Greedy continuations: the model's are transformers' own, the bundle's are what the runtime writes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from spike_export.calibration.decoder.layerwise import Decoder
from spike_export.checkpoint.modules import linears
from spike_export.engines.accuracy.continuations import Continuation, compare_continuations
from spike_export.engines.onnx_runtime.decoding import OnnxDecoding
from spike_export.engines.onnx_runtime.session import open_for_generation
from spike_export.export.bundle import ExportOptions, export_bundle
from tests.support.tiny.models import TinyModel, tiny_llama, tiny_recipe, unquantized_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = np.random.default_rng(0).integers(3, 99, (3, 8))
PREFIX, TOKENS = (5, 1), 9


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return tiny_llama()


def greedy(model: TinyModel) -> list[tuple[int, ...]]:
    """Continue by transformers' model, a token at a time, behind the prefix, which holds BOS."""
    rows = np.concatenate([np.tile(PREFIX, (len(PROMPTS), 1)), PROMPTS], axis=1)
    tokens = torch.from_numpy(rows)
    with torch.inference_mode():
        for _ in range(TOKENS):
            following = model.reference(tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, following], dim=1)
    return [tuple(row) for row in tokens[:, -TOKENS:].tolist()]


def test_the_models_continuations_are_transformers(model: TinyModel, tmp_path: Path) -> None:
    """Also where the guess, the bundle's, is bad: coarse scales make another text."""
    expected, seen = greedy(model), []
    scales = dict.fromkeys(linears(model.checkpoint.config), 0.5)
    for index, recipe in enumerate(
        (tiny_recipe(model.checkpoint, scales, prefix=PREFIX), unquantized_recipe(model.checkpoint, PREFIX))
    ):
        export_bundle(model.checkpoint, recipe, ExportOptions("float32"), tmp_path / str(index))
        runtime = OnnxDecoding(open_for_generation(tmp_path / str(index), 1))
        found = compare_continuations(runtime, Decoder(model.checkpoint), PROMPTS, PREFIX, TOKENS)
        assert [row.reference for row in found.rows] == expected
        assert [row.prompt for row in found.rows] == [tuple(row) for row in PROMPTS.tolist()]
        seen.append(found)
    assert seen[0].equal < 3
    assert seen[1].equal == 3
    assert [row.bundle for row in seen[1].rows] == expected


def test_the_first_difference_is_the_point_of_divergence() -> None:
    assert Continuation((1,), (4, 5, 6), (4, 7, 6)).divergence == 1
    assert Continuation((1,), (4, 5), (4, 5)).divergence is None
