"""Rows of a tensor, read without the others."""

import errno
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spike_export.artifacts.errors import CheckpointError
from spike_export.artifacts.files.atomic_write import atomic_path
from spike_export.calibration.decoder.equivalent.equivalent_weights import equivalent_checkpoint
from spike_export.calibration.decoder.equivalent.smoothing import smoothing_plan
from spike_export.calibration.decoder.layerwise import Decoder, Execution
from spike_export.checkpoint.checkpoint import EMBEDDING, LM_HEAD, Checkpoint
from spike_export.checkpoint.opening import open_checkpoint
from tests.support.tiny.checkpoints import random_llama, write_hf
from tests.support.tiny.models import tiny_llama


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_are_those_of_the_whole_tensor(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = open_checkpoint(str(write_hf(tmp_path, random_llama(tie_word_embeddings=True), dtype=dtype)))
    for rows in (np.array([5, 0, 257, 5]), np.arange(3, 9), np.arange(250, 258), np.array([257])):
        for name in (EMBEDDING, LM_HEAD, "model.layers.1.mlp.down_proj.weight"):
            within = rows % checkpoint.stored_shape(name)[0] if name.endswith("down_proj.weight") else rows
            found = checkpoint.rows(name, within)
            assert found.dtype == np.float32
            assert np.array_equal(found, checkpoint.tensor(name)[within])


@pytest.mark.parametrize("rows", [[-1], [257, 258], [-2, -1]])
def test_rows_outside_are_never_other_bytes_of_the_file(tmp_path: Path, rows: list[int]) -> None:
    checkpoint = open_checkpoint(str(write_hf(tmp_path, random_llama())))
    with pytest.raises(IndexError):
        checkpoint.rows(EMBEDDING, np.array(rows))


def test_a_file_that_became_shorter_is_named(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_hf(tmp_path, random_llama())))
    last = max(checkpoint.tensors.shapes)
    assert len(checkpoint.rows(last, np.array([0]))) == 1
    (file,) = tmp_path.glob("*.safetensors")
    with file.open("r+b") as stream:
        stream.truncate(4096)
    with pytest.raises(CheckpointError, match=r"safetensors: the file ends within tensor "):
        checkpoint.rows(EMBEDDING, np.arange(200, 258))


def test_a_shard_that_vanished_or_cannot_be_read_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    directory = write_hf(tmp_path / "model", random_llama())
    (file,) = directory.glob("*.safetensors")
    opened, fresh = open_checkpoint(str(directory)), open_checkpoint(str(directory))
    assert len(opened.rows(EMBEDDING, np.array([0]))) == 1  # has read the header, and `fresh` has not
    file.unlink()
    for checkpoint in (opened, fresh):
        # Inside of what writes an artifact, an OSError would be told as one of the writing.
        with (
            pytest.raises(CheckpointError, match=r"model\.safetensors: this shard is missing; download it again"),
            atomic_path(tmp_path / "bundle"),
            checkpoint.block_reader(EMBEDDING),
        ):
            pass
    file.mkdir()
    with (
        pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read \(Is a directory\); check the disk"),
        opened.block_reader(EMBEDDING),
    ):
        pass


def test_a_disk_that_fails_while_a_shard_is_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(str(write_hf(tmp_path, random_llama())))

    class Failing(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    assert len(checkpoint.rows(EMBEDDING, np.array([0]))) == 1
    monkeypatch.setattr(Path, "open", lambda path, *_, **__: Failing(path))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read \(Input/output error\)"):
        checkpoint.rows(EMBEDDING, np.arange(4))


def test_a_source_of_whole_tensors_yields_rows_too() -> None:
    checkpoint = tiny_llama().checkpoint
    rows = np.array([3, 1])
    assert np.array_equal(checkpoint.rows(EMBEDDING, rows), checkpoint.tensor(EMBEDDING)[rows])


def test_rows_of_a_tensor_that_is_not_there(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_hf(tmp_path, random_llama())))
    with pytest.raises(CheckpointError, match="tensor x is not in the checkpoint"):
        checkpoint.rows("x", np.array([0]))


@pytest.mark.parametrize("token", [-1, 258])
def test_a_token_outside_the_vocabulary_is_never_another_one(tmp_path: Path, token: int) -> None:
    checkpoint = open_checkpoint(str(write_hf(tmp_path, random_llama())))
    for resident in (True, False):
        with pytest.raises(IndexError):
            Decoder(checkpoint, Execution(resident=resident)).run(np.array([[1, token]]))


@pytest.mark.parametrize("smoothed", [False, True], ids=["stored", "smoothed"])
def test_the_whole_embedding_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smoothed: bool) -> None:
    # The padding token is not among the windows'.
    checkpoint = open_checkpoint(str(write_hf(tmp_path, random_llama(pad_token_id=200))))
    if smoothed:
        scales = np.geomspace(0.5, 2.0, 64).astype(np.float32)
        plan = smoothing_plan("smoothquant", 0.5, scales)
        checkpoint = equivalent_checkpoint(checkpoint, None, {"model.layers.1.self_attn.q_proj": plan})
    windows = np.random.default_rng(0).integers(2, 100, (3, 7))
    whole = Decoder(checkpoint).run(windows, (0, 9))
    read: list[str] = []
    tensor = Checkpoint.tensor

    def noted(self: Checkpoint, name: str) -> np.ndarray:
        read.append(name)
        return tensor(self, name)

    monkeypatch.setattr(Checkpoint, "tensor", noted)
    rows = Decoder(checkpoint, Execution(resident=False)).run(windows, (0, 9))
    assert read
    assert EMBEDDING not in read
    for index in range(len(whole)):
        assert torch.equal(whole.get(index), rows.get(index))
