"""How far a graph's logits are from those of transformers' own model, and what both are compared by."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.support.tiny.families import prefix_masks
from tests.support.tiny.models import TinyModel

PARITY = 2e-5
"""Part of the logits' scale. Float32 summation in another order: 80 terms of 6e-8 each in every product of at most four
layers and the head, whose residual stream the factors of some families stretch. Seen: 3e-6."""


def reference_logits(model: TinyModel, ids: NDArray[np.int64], prefix: tuple[int, ...] = ()) -> NDArray[np.float32]:
    """Return transformers' logits of `ids` behind a prefix that all of them see, whatever their window."""
    whole = torch.from_numpy(np.concatenate([np.tile(np.array(prefix, np.int64), (len(ids), 1)), ids], axis=1))
    mask = prefix_masks(model, len(prefix), ids.shape[1])
    with torch.inference_mode():
        logits: NDArray[np.float32] = model.reference(whole, attention_mask=mask, use_cache=False).logits.numpy()
    return logits[:, len(prefix) :]


def relative_error(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    """Return the largest error as a part of the logits' scale."""
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def assert_close(actual: NDArray[Any], expected: NDArray[Any], tolerance: float = PARITY) -> None:
    """Fail where the largest error is above a part of the logits' scale."""
    assert relative_error(actual, expected) <= tolerance


def token_errors(actual: NDArray[Any], expected: NDArray[Any]) -> NDArray[Any]:
    """Return per token the largest error as a part of the logits' scale."""
    result: NDArray[Any] = np.abs(actual - expected).max(axis=-1) / np.abs(expected).max()
    return result
