"""A device's sampler draws what the CPU's draws, and waits for nothing."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from spike_export.engines.generation import sampling
from spike_export.engines.generation.options import GenerationOptions
from spike_export.engines.tensorrt.sampling import Sampler, filtered, seen_tokens

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def logits_of(rows: int, vocab: int, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, vocab), np.float32) * np.float32(3)


@settings(deadline=None, max_examples=100)
@given(
    fields=st.fixed_dictionaries(
        {
            "seed": st.integers(0, 2**62 - 1),
            "do_sample": st.booleans(),
            "temperature": st.floats(0.3, 3),
            "top_k": st.integers(0, 60),
            "top_p": st.floats(0.1, 1.0),
            "min_p": st.sampled_from([0.0, 0.1]),
            "repetition_penalty": st.sampled_from([1.0, 1.3]),
            "presence_penalty": st.sampled_from([0.0, 0.7]),
            "frequency_penalty": st.sampled_from([0.0, -0.4]),
            "logit_bias": st.sampled_from([(), ((3, 2.0), (9, -torch.inf))]),
            "logprobs": st.sampled_from([None, 0, 3]),
            "logprobs_as_drawn": st.booleans(),
        }
    ),
    rounded=st.booleans(),
)
def test_a_device_draws_what_the_cpu_draws(fields: dict[str, Any], rounded: bool) -> None:
    """Rounded scores are equal in many places, where the order of the tokens decides."""
    options = GenerationOptions(max_new_tokens=4, **fields)
    prompts = [np.arange(row, 20, 3) for row in range(3)]
    ours, seen = sampling.Sampler(options, 3), sampling.seen_tokens(prompts, 50, options)
    theirs, seen_there = Sampler(options, 3, CPU), seen_tokens(prompts, 50, options, CPU)
    for step in range(4):
        logits = logits_of(3, 50, fields["seed"] + step)
        logits = logits.round() if rounded else logits
        first, second = ours.draw(logits, seen), theirs.draw(torch.from_numpy(logits), seen_there)
        assert first.tokens.tolist() == second.tokens.tolist()
        assert (first.logprobs is None) == (second.logprobs is None)
        assert (first.top_tokens is None) == (second.top_tokens is None)
        if first.logprobs is not None:
            np.testing.assert_allclose(first.logprobs, second.logprobs, atol=4e-6, rtol=0)
        if first.top_logprobs is not None:  # of equal ones the order is open
            np.testing.assert_allclose(first.top_logprobs, second.top_logprobs, atol=4e-6, rtol=0)


@pytest.mark.parametrize("fields", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}], ids=str)
def test_what_is_drawn_is_a_token_even_of_what_is_no_number(fields: dict[str, Any]) -> None:
    """What lies behind the vocabulary would be read as an embedding before anybody sees the logits."""
    options = GenerationOptions(do_sample=True, seed=0, repetition_penalty=1.5, **fields)
    seen = torch.zeros(2, 9, dtype=torch.bool)
    tokens = Sampler(options, 2, CPU).draw(torch.full((2, 9), torch.nan), seen).tokens
    assert ((tokens >= 0) & (tokens < 9)).all()


def test_top_p_over_a_large_vocabulary() -> None:
    options, scores = GenerationOptions(do_sample=True, top_p=0.9), logits_of(2, 5000, 3)
    ours, theirs = np.isfinite(sampling.filtered(scores, options)), filtered(torch.from_numpy(scores), options)
    assert np.abs(ours.sum(-1) - theirs.isfinite().numpy().sum(-1)).max() <= 1  # one at the edge, by rounding


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_the_draws_are_the_cpus_and_nothing_waits_for_it() -> None:
    options = GenerationOptions(
        do_sample=True, seed=2, top_p=0.9, min_p=0.01, repetition_penalty=1.2, logprobs=3, max_new_tokens=20
    )
    drawn = []
    for name in ("cpu", "cuda"):
        device = torch.device(name)
        sampler, seen = Sampler(options, 4, device), seen_tokens([np.arange(5)] * 4, 500, options, device)
        steps = [torch.from_numpy(logits_of(4, 500, seed)).to(device) for seed in range(20)]
        torch.cuda.set_sync_debug_mode("error")
        try:
            tokens = [sampler.draw(logits, seen).tokens for logits in steps]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        drawn.append(torch.stack(tokens).tolist())
    assert drawn[0] == drawn[1]
