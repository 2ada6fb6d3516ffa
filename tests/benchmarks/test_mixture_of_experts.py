"""The benchmark of mixtures measures the same model twice."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.large.mixture_of_experts import MIXTURES, Mixture, measure, sessions_of
from tests.support.tiny.families import MIXTURES as FAMILIES


@pytest.mark.parametrize("name", FAMILIES)
def test_both_forms_are_the_same_model(tmp_path: Path, name: str) -> None:
    sessions = sessions_of(Mixture(name, 4, 2, 64, 96), tmp_path, 1)
    ids = np.arange(6).reshape(2, 3)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    feeds |= {f"past_key_values.0.{kind}": np.zeros((2, 2, 0, 128), np.float32) for kind in ("key", "value")}
    whole, used = (session.run(["logits"], feeds)[0] for session in sessions.values())
    assert np.abs(whole).max() > 0.1
    np.testing.assert_array_equal(whole, used)
    assert {form: len(seconds) for form, seconds in measure(sessions, 2, 1, 3).items()} == dict.fromkeys(sessions, 3)


def test_every_family_with_experts_is_measured() -> None:
    assert {mixture.model_type for mixture in MIXTURES.values()} == set(FAMILIES)
