"""The work directory's scratch folder."""

from pathlib import Path

import pytest

from spike_export.pipeline.run_directory import RunDirectory


def test_scratch_starts_empty_and_leaves_nothing(tmp_path: Path) -> None:
    left = tmp_path / ".scratch" / "logits" / "0.npy"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"of a killed run")
    with RunDirectory(tmp_path).scratch() as folder:
        assert list(folder.iterdir()) == []
        (folder / "file").touch()
    assert list(tmp_path.iterdir()) == []


def test_scratch_is_removed_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), RunDirectory(tmp_path).scratch():
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
