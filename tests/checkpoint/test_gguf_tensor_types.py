"""Tensor types of GGUF files: values by gguf's own dequantization and by each format's definition, rows, and memory."""

import struct
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from spike_export.artifacts.errors import CheckpointError
from spike_export.checkpoint.checkpoint import EMBEDDING
from spike_export.checkpoint.gguf_file import GgufSource
from spike_export.checkpoint.opening import open_checkpoint
from tests.support.tiny.checkpoints import random_decoder, random_llama, write_gguf

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "Q4_K", "Q5_K", "Q6_K")

HALVES: Mapping[str, tuple[int, ...]] = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
"""Type → where a block's float16 scale (and minimum) stand; random bytes there would be NaN now and then."""


def stored(kind: str, rows: int, columns: int) -> NDArray[Any]:
    """Return random content of a tensor [rows, columns] as a file holds it."""
    random = np.random.default_rng(5)
    if kind in ("F32", "F16"):
        return random.normal(size=(rows, columns)).astype(np.float32 if kind == "F32" else np.float16)
    if kind == "BF16":
        values = random.normal(size=(rows, columns)).astype(np.float32)
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    content = random.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
    for at in HALVES[kind]:
        scales = random.uniform(0.001, 0.01, content.shape[:2]).astype(np.float16)
        content[:, :, at : at + 2] = scales[..., None].view(np.uint8)
    return content.reshape(rows, -1)


def source(path: Path, kind: str, content: NDArray[Any]) -> GgufSource:
    """Write one tensor `t` as it is and open it."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("t", content, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (record,) = gguf.GGUFReader(path).tensors
    assert record.tensor_type.name == kind
    return GgufSource(path, {"t": record}, {})


def halves(blocks: NDArray[np.uint8], at: int) -> NDArray[np.float32]:
    """Return the float16 at a place of each block, [blocks, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def nibbles(raw: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the low halves of all bytes, then the high ones."""
    return np.concatenate([raw & 15, raw >> 4], axis=1).astype(np.int64)


def fifth_bits(blocks: NDArray[np.uint8], at: int) -> NDArray[np.int64]:
    """Return 16 or 0 for each of 32 values from the four bytes of their highest bits."""
    return 16 * np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little").astype(np.int64)


def six_bits(raw: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return eight 6-bit scales and minima [blocks, 8, 1] from twelve bytes."""
    first, second, third = (raw[:, at : at + 4].astype(np.int64) for at in (0, 4, 8))
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], axis=1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=1)
    return scales[:, :, None], minima[:, :, None]


def in_eighths(quants: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return 4-bit values [blocks, 8, 32]: of each 32 bytes the low halves, then the high ones."""
    quarters = quants.reshape(len(quants), 4, 1, 32)
    return np.concatenate([quarters & 15, quarters >> 4], axis=2).reshape(len(quants), 8, 32).astype(np.int64)


def with_minima(blocks: NDArray[np.uint8], values: NDArray[np.int64]) -> NDArray[np.float32]:
    scales, minima = six_bits(blocks[:, 4:16])
    d, low = halves(blocks, 0)[:, :, None], halves(blocks, 2)[:, :, None]
    return np.asarray(d * scales * values - low * minima, np.float32).reshape(len(blocks), -1)


def q5_k(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    high = np.unpackbits(blocks[:, 16:48, None], axis=2, bitorder="little").transpose(0, 2, 1)
    return with_minima(blocks, in_eighths(blocks[:, 48:]) + 16 * high.astype(np.int64))


def q6_k(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    low = blocks[:, :128].reshape(-1, 2, 1, 64)
    low = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3
    values = (low | high << 4).astype(np.int64).reshape(-1, 16, 16) - 32
    scales = blocks[:, 192:208].view(np.int8).astype(np.int64)[:, :, None]
    return np.asarray(halves(blocks, 208)[:, :, None] * scales * values, np.float32).reshape(len(blocks), -1)


DEFINITIONS: Mapping[str, Callable[[NDArray[np.uint8]], NDArray[Any]]] = {
    "Q4_0": lambda b: halves(b, 0) * (nibbles(b[:, 2:]) - 8),
    "Q4_1": lambda b: halves(b, 0) * nibbles(b[:, 4:]) + halves(b, 2),
    "Q5_0": lambda b: halves(b, 0) * (nibbles(b[:, 6:]) + fifth_bits(b, 2) - 16),
    "Q5_1": lambda b: halves(b, 0) * (nibbles(b[:, 8:]) + fifth_bits(b, 4)) + halves(b, 2),
    "Q8_0": lambda b: halves(b, 0) * b[:, 2:].view(np.int8),
    "Q4_K": lambda b: with_minima(b, in_eighths(b[:, 16:])),
    "Q5_K": q5_k,
    "Q6_K": q6_k,
}


@pytest.mark.parametrize("kind", TYPES)
def test_values_are_those_of_gguf_and_of_the_definition(tmp_path: Path, kind: str) -> None:
    content = stored(kind, 40, 512)
    read = source(tmp_path / "one.gguf", kind, content).read("t")
    assert (read.shape, read.dtype) == ((40, 512), np.float32)
    assert read.flags.writeable
    np.testing.assert_array_equal(read, gguf.dequantize(content, gguf.GGMLQuantizationType[kind]))
    if kind in DEFINITIONS:
        size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
        defined = DEFINITIONS[kind](content.reshape(-1, size)).reshape(40, 512)
        # Three float32 roundings, of terms as large as the largest.
        np.testing.assert_allclose(read, defined, rtol=0, atol=4e-7 * np.abs(defined).max())
        assert np.unique(read).size > 1000
    else:
        exact = content.view(np.uint16).astype(np.uint32) << 16 if kind == "BF16" else content
        np.testing.assert_array_equal(read, exact.view(np.float32) if kind == "BF16" else exact.astype(np.float32))


@pytest.mark.parametrize("kind", TYPES)
def test_rows_are_those_of_the_whole_tensor(tmp_path: Path, kind: str) -> None:
    opened = source(tmp_path / "one.gguf", kind, stored(kind, 40, 256))
    rows = np.array([7, 0, 39, 7])
    np.testing.assert_array_equal(opened.read_rows("t", rows), opened.read("t")[rows])
    for outside in (-1, 40):
        with pytest.raises(IndexError):
            opened.read_rows("t", np.array([0, outside]))


def test_rows_of_a_model_are_in_hugging_faces_order(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_gguf(tmp_path / "m.gguf", random_llama()).path))
    rows = np.array([9, 2, 9])
    for name in (EMBEDDING, "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"):
        np.testing.assert_array_equal(checkpoint.rows(name, rows), checkpoint.tensor(name)[rows])
    with pytest.raises(CheckpointError, match="tensor x is not in the file"):
        checkpoint.rows("x", rows)


def test_values_of_a_shifted_norm_are_shifted_too(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_gguf(tmp_path / "m.gguf", random_decoder("gemma")).path))
    rows = np.array([1, 0])
    np.testing.assert_array_equal(
        checkpoint.rows("model.norm.weight", rows), checkpoint.tensor("model.norm.weight")[rows]
    )


@pytest.mark.parametrize("kind", TYPES)
def test_reading_takes_three_times_the_tensor_at_most(tmp_path: Path, kind: str) -> None:
    opened = source(tmp_path / "one.gguf", kind, stored(kind, 1024, 1024))
    permuted = GgufSource(opened.path, opened.tensors, {"t": 8})
    for each in (opened, permuted):
        tracemalloc.start()
        try:
            size = each.read("t").nbytes
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 3 * size, peak / size


def test_reading_rows_takes_no_memory_for_the_others(tmp_path: Path) -> None:
    opened = source(tmp_path / "one.gguf", "Q4_K", stored("Q4_K", 4096, 512))
    tracemalloc.start()
    try:
        opened.read_rows("t", np.arange(0, 64))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4096 * 512 * 4 / 8


def test_a_type_newer_than_the_reader_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "new.gguf", random_llama()).path
    content = bytearray(path.read_bytes())
    name = b"blk.0.ffn_up.weight"
    # Behind the name: the number of dimensions (4 bytes), two dimensions (8 each), then the type.
    at = content.index(name) + len(name) + 4 + 16
    assert gguf.GGMLQuantizationType(struct.unpack_from("<I", content, at)[0]).name in TYPES
    struct.pack_into("<I", content, at, 231)
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(path))
    said = str(caught.value)
    assert said.startswith(f"{path}: tensor blk.0.ffn_up.weight: type 231 is unknown; take a file of another type")
    assert "\n" not in said
