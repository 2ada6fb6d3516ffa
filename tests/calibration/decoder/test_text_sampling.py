"""Text that the model draws: every token follows from the whole sequence before it, and from the seed."""

import numpy as np
import pytest
import torch

from spike_export.calibration.decoder.layerwise import Decoder
from spike_export.calibration.decoder.text_sampling import cache_bytes, sampled_tokens
from tests.support.tiny.families import WINDOW, tiny_family

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = 24
assert TOKENS > 2 * WINDOW


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen2", "phi3", "mixtral"])
def test_each_token_is_drawn_from_what_transformers_predicts(name: str) -> None:
    model = tiny_family(name)
    begins = [[0, 5, 7], [9]]
    found = sampled_tokens(Decoder(model.checkpoint), begins, TOKENS, seed=3)
    assert found.shape == (2, TOKENS)
    with torch.inference_mode():
        logits = model.reference(torch.from_numpy(found)).logits.double().numpy()
    draw = np.random.default_rng(3)
    for place in range(1, TOKENS):
        expected = (logits[:, place - 1] + draw.gumbel(size=(2, 99))).argmax(-1)
        for row, begin in enumerate(begins):
            assert found[row, place] == (begin[place] if place < len(begin) else expected[row]), (row, place)
    assert found[1, 0] == 9


def test_the_seed_decides() -> None:
    decoder = Decoder(tiny_family("llama").checkpoint)
    first, again, other = (sampled_tokens(decoder, [[0], [0]], TOKENS, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first[0] != first[1]).any()


def test_the_size_of_the_cache() -> None:
    # 4 layers, 2 heads of 16 channels, keys and values, 4 bytes each.
    assert cache_bytes(Decoder(tiny_family("llama").checkpoint), 10) == 2 * 4 * 2 * 16 * 10 * 4
