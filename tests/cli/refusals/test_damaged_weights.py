"""Weights whose perplexity is no figure: one line speaks of weights, and nothing stays broken."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.support.tiny.cli_models import SMALL, call, write_corpus, write_model

pytestmark = pytest.mark.usefixtures("one_thread")

Tensors = dict[str, np.ndarray]


def head_with_a_nan(tensors: Tensors) -> None:
    tensors["lm_head.weight"][3, 2] = np.nan


def head_that_overflows(tensors: Tensors) -> None:
    tensors["lm_head.weight"] *= np.float32(1e30)


def all_zero(tensors: Tensors) -> None:
    for tensor in tensors.values():
        tensor[...] = 0


@pytest.mark.parametrize("damage", [head_with_a_nan, head_that_overflows, all_zero])
def test_one_line_names_the_weights(tmp_path: Path, damage: Callable[[Tensors], None]) -> None:
    model = write_model(tmp_path / "model")
    (file,) = model.glob("*.safetensors")
    tensors = load_file(file)
    if "lm_head.weight" not in tensors:
        pytest.fail("the model's head is tied: the test needs one of its own")
    damage(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    run = tmp_path / "run"
    command = ("calibrate", model, "--work-dir", run, "--corpus", write_corpus(tmp_path / "corpus.txt"), *SMALL)
    for _ in range(2):  # the second time from what the first one left
        line = call(*command).error
        assert "weights" in line, line
        assert "--force" not in line
