"""Arrays of a GGUF file's metadata: what the gguf library reads value by value is read the same at once."""

from pathlib import Path

import gguf
import pytest

from spike_export.artifacts.errors import CheckpointError
from spike_export.checkpoint.gguf_records import read_gguf

ARRAYS: dict[str, bytes | list[int] | list[float] | list[bool] | list[str]] = {
    "whole": [3, 1, 2],
    "negative": [-(2**31), 0],
    "bytes": b"abc",
    "real": [0.5, -2.0, 1e-3],
    "flags": [True, False],
    "text": ["", "a", "caf\u00e9", "x" * 300],
}


def written(path: Path, order: gguf.GGUFEndian) -> Path:
    writer = gguf.GGUFWriter(path, "llama", endianess=order)
    for name, values in ARRAYS.items():
        writer.add_array(name, values)
    writer.add_uint32("behind", 7)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("order", list(gguf.GGUFEndian))
def test_arrays_are_read_as_gguf_reads_them(tmp_path: Path, order: gguf.GGUFEndian) -> None:
    path = written(tmp_path / "arrays.gguf", order)
    fields, _ = read_gguf(path)
    reference = gguf.GGUFReader(path)
    assert fields == {name: field.contents() for name, field in reference.fields.items()}
    assert fields["text"] == ARRAYS["text"]
    assert fields["behind"] == 7


def test_a_file_that_ends_inside_an_array_is_damaged(tmp_path: Path) -> None:
    whole = written(tmp_path / "arrays.gguf", gguf.GGUFEndian.LITTLE).read_bytes()
    for name, length in (("text", 24), ("real", 20)):
        start = whole.index(name.encode()) + len(name) + 4 + 12
        (tmp_path / "cut.gguf").write_bytes(whole[: start + length - 1])
        with pytest.raises(CheckpointError, match="damaged or truncated GGUF file"):
            read_gguf(tmp_path / "cut.gguf")


def test_an_array_of_arrays_is_left_to_gguf(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "nested.gguf", "llama")
    writer.add_array("nested", [[1, 2], [3]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    fields, _ = read_gguf(tmp_path / "nested.gguf")
    assert fields["nested"] == gguf.GGUFReader(tmp_path / "nested.gguf").fields["nested"].contents()
