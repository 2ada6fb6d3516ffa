"""Perplexity against torch's own loss on transformers' logits."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from spike_export.calibration.decoder.layerwise import Decoder, Execution
from spike_export.calibration.decoder.perplexity import Likelihood, model_perplexity, with_bos
from tests.support.tiny.families import NAMES, tiny_family, tokens
from tests.support.tiny.models import TinyModel

pytestmark = pytest.mark.usefixtures("one_thread")

PREFIX = (1, 7, 42)


def plain_perplexity(model: TinyModel, fed: NDArray[np.int64], content: int) -> float:
    """Return the perplexity of all content tokens but the first."""
    with torch.inference_mode():
        logits = model.reference(torch.from_numpy(fed), use_cache=False).logits.double()
    scored = content - 1
    targets = torch.from_numpy(fed[:, -scored:])
    return math.exp(torch.nn.functional.cross_entropy(logits[:, -scored - 1 : -1].flatten(0, 1), targets.flatten()))


@pytest.mark.parametrize("name", NAMES)
def test_perplexity_is_torchs_cross_entropy(name: str) -> None:
    model, content = tiny_family(name), tokens(rows=9, length=20)
    fed = with_bos(content, 1)
    assert fed.shape == (9, 21)
    for execution in (Execution(), Execution(resident=False, activation_bytes=0)):
        actual = model_perplexity(Decoder(model.checkpoint, execution), fed, 20)
        # float32 logits up to 10 on both sides: 1e-5 absolute in the mean loss.
        assert actual == pytest.approx(plain_perplexity(model, fed, 20), rel=1e-5)


@pytest.mark.parametrize("length", [2, 300])  # 300: the head takes more than one turn
def test_perplexity_of_short_and_long_windows(length: int) -> None:
    model, content = tiny_family("llama", max_position_embeddings=512), tokens(rows=9, length=length)
    fed = with_bos(content, 1)
    actual = model_perplexity(Decoder(model.checkpoint), fed, length)
    assert actual == pytest.approx(plain_perplexity(model, fed, length), rel=1e-5)


def test_perplexity_scores_the_same_tokens_behind_a_prefix() -> None:
    model, content = tiny_family("llama"), tokens(rows=5)
    decoder = Decoder(model.checkpoint)
    whole = np.concatenate([np.tile(PREFIX, (5, 1)), content], axis=1)
    actual = model_perplexity(decoder, content, content.shape[1], PREFIX)
    assert actual == pytest.approx(plain_perplexity(model, whole, content.shape[1]), rel=1e-5)
    assert actual != pytest.approx(model_perplexity(decoder, content, content.shape[1]), rel=1e-3)


def test_perplexity_of_what_cannot_be_is_infinite() -> None:
    assert Likelihood(1e6, 2).perplexity == math.inf
    assert (Likelihood(1.0, 1) + Likelihood(3.0, 3)).perplexity == math.e


def test_bos_goes_before_each_window_unless_there_is_none() -> None:
    content = tokens(rows=2, length=3)
    assert with_bos(content, 0)[:, 0].tolist() == [0, 0]
    np.testing.assert_array_equal(with_bos(content, 0)[:, 1:], content)
    assert with_bos(content, None) is content
