"""What is kept of a large vocabulary's distributions suffices: all figures but the divergence's tail are exact."""

import numpy as np
import torch
from numpy.typing import NDArray

from spike_export.engines.accuracy.distances import distances
from spike_export.engines.accuracy.predictions import KEPT, SAMPLES, predictions, record_type

VOCABULARY, ROWS, FEW = 300, 130, 8


def logits(seed: int) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal((ROWS, VOCABULARY)) * 2).astype(np.float32)


REFERENCE = logits(0)
OTHER = REFERENCE + np.float32(0.3) * np.random.default_rng(1).standard_normal(REFERENCE.shape).astype(np.float32)
TARGETS = np.random.default_rng(2).integers(0, VOCABULARY, ROWS)


def probabilities(values: NDArray[np.float32]) -> NDArray[np.float64]:
    return torch.from_numpy(values).double().softmax(-1).numpy()


def test_what_needs_no_sum_over_all_tokens_is_exact() -> None:
    whole, few = (distances(predictions(REFERENCE, TARGETS, kept), OTHER, TARGETS) for kept in (KEPT, FEW))
    for field in ("negative", "reference_negative", "same_best", "best_among_first"):
        np.testing.assert_array_equal(getattr(few, field), getattr(whole, field))
    assert not np.array_equal(few.divergence, whole.divergence)


def test_the_kept_tokens_are_the_likeliest_and_the_others_are_none_of_them() -> None:
    found = predictions(REFERENCE, TARGETS, FEW)
    likeliest = np.argsort(-REFERENCE, axis=1)[:, :FEW]
    np.testing.assert_array_equal(np.sort(found["tokens"]), np.sort(likeliest))
    np.testing.assert_array_equal(found["best"], likeliest[:, 0])
    assert found["others"].shape == (ROWS, SAMPLES)
    assert not any(np.isin(others, kept).any() for others, kept in zip(found["others"], found["tokens"], strict=True))
    kept = np.take_along_axis(probabilities(REFERENCE), likeliest, axis=1).sum(axis=1)
    np.testing.assert_allclose(np.exp(found["log_rest"]), 1 - kept, rtol=1e-9)


def test_the_divergence_has_no_bias_and_a_small_error() -> None:
    """Over many samples the mean is that of the formula; one sample already is close, and never below the bound."""
    p, q = probabilities(REFERENCE), probabilities(OTHER)
    exact = (p * np.log(p / q)).sum(axis=1)
    found = np.stack(
        [distances(predictions(REFERENCE, TARGETS, FEW, seed), OTHER, TARGETS).divergence for seed in range(40)]
    )
    error = found.mean(axis=1) - exact.mean()
    assert abs(error.mean()) < 4 * error.std(ddof=1) / np.sqrt(len(error))
    assert error.std(ddof=1) < 0.01 * exact.mean()
    kept = np.argsort(-REFERENCE, axis=1)[:, :FEW]
    p_kept, q_kept = (np.take_along_axis(each, kept, axis=1) for each in (p, q))
    rest, of_rest = (1 - each.sum(axis=1) for each in (p_kept, q_kept))
    together = (p_kept * np.log(p_kept / q_kept)).sum(axis=1) + rest * np.log(rest / of_rest)
    assert (found > together - 1e-12).all()
    assert exact.mean() > 1.2 * together.mean()  # so that the sample, and not the bound, makes the figure


def test_a_distribution_is_at_no_distance_from_itself_where_few_tokens_are_kept() -> None:
    same = distances(predictions(REFERENCE, TARGETS, FEW), REFERENCE, TARGETS)
    np.testing.assert_allclose(same.divergence, 0, atol=1e-12)


def test_certainty_leaves_nothing_to_draw_from() -> None:
    """The others' probabilities vanish in float64: they count for nothing, and nothing is undefined."""
    certain = np.full((1, VOCABULARY), -2000.0, np.float32)
    certain[0, :FEW] = np.arange(FEW) * 10.0
    found = distances(predictions(certain, TARGETS[:1], FEW), OTHER[:1], TARGETS[:1])
    q = probabilities(OTHER[:1])
    p = probabilities(certain[:, :FEW])
    np.testing.assert_allclose(found.divergence, (p * (np.log(p) - np.log(q[:, :FEW]))).sum(axis=1), rtol=1e-9)


def test_a_record_takes_a_few_kilobytes_whatever_the_vocabulary() -> None:
    assert record_type(49_152).itemsize == record_type(262_144).itemsize == KEPT * 8 + SAMPLES * 8 + 28
    assert record_type(99).itemsize == 99 * 8 + 28
