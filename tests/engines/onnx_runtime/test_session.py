"""Bundles in ONNX Runtime: logits as transformers', with the BOS and prefix rules of the manifest; refusals."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from spike_export.artifacts.errors import ArtifactError, EngineError
from spike_export.artifacts.recipe import Dtype
from spike_export.engines.onnx_runtime.denormals import denormals_flushed
from spike_export.engines.onnx_runtime.session import BundleSession, open_bundle
from spike_export.export.bundle import ExportOptions, export_bundle
from tests.support.tiny.models import TinyModel, tiny_llama, unquantized_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

BOS = 1


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return tiny_llama()


@pytest.fixture(scope="module")
def content() -> NDArray[np.int64]:
    return np.random.default_rng(1).integers(3, 99, (2, 9))


def exported(
    model: TinyModel, folder: Path, *, bos: int | None, prefix: tuple[int, ...] = (), dtype: Dtype = "float32"
) -> BundleSession:
    """A bundle with nothing quantized, so that logits can be compared exactly."""
    checkpoint = replace(model.checkpoint, config=replace(model.checkpoint.config, bos_token_id=bos, eos_token_ids=()))
    recipe = unquantized_recipe(checkpoint, prefix, dtype) if prefix else None
    export_bundle(checkpoint, recipe, ExportOptions(dtype), folder)
    return open_bundle(folder, threads=1)


def expected(model: TinyModel, first: tuple[int, ...], content: NDArray[np.int64]) -> NDArray[np.float32]:
    """transformers' logits of the content's tokens with `first` before them."""
    before = np.tile(np.asarray(first, np.int64), (len(content), 1))
    with torch.inference_mode():
        logits = model.reference(torch.from_numpy(np.concatenate([before, content], axis=1))).logits
    result: NDArray[np.float32] = logits[:, len(first) :].numpy()
    return result


@pytest.mark.parametrize(
    ("bos", "prefix", "first"),
    [
        (BOS, (), (BOS,)),  # BOS is fed before the text
        (0, (), (0,)),  # an id that is falsy
        (None, (), ()),  # a model without BOS
        (BOS, (BOS,), (BOS,)),  # the prefix holds BOS: it is not fed again
        (BOS, (BOS, 7, 8), (BOS, 7, 8)),
        (BOS, (7, 8), (7, 8, BOS)),  # a prefix without BOS, as one edits a recipe
    ],
)
def test_prefill_is_transformers_forward(
    model: TinyModel,
    content: NDArray[np.int64],
    tmp_path: Path,
    bos: int | None,
    prefix: tuple[int, ...],
    first: tuple[int, ...],
) -> None:
    session = exported(model, tmp_path / "b", bos=bos, prefix=prefix)
    logits = session.prefill(content)
    assert logits.shape == (*content.shape, 99)
    wanted = expected(model, first, content)
    # float32 with another order of summation over some 80 products, at logits of about 5.
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-4)
    # The comparison can fail: without what stands before, the logits are others.
    assert not first or np.abs(expected(model, (), content) - wanted).max() > 1e-2


def test_float16_stays_near_transformers(model: TinyModel, content: NDArray[np.int64], tmp_path: Path) -> None:
    session = exported(model, tmp_path / "b", bos=BOS, dtype="float16")
    wanted = expected(model, (BOS,), content)
    difference = np.abs(session.prefill(content).astype(np.float32) - wanted)
    assert 0 < difference.max() < 0.02 * np.abs(wanted).max()


def test_a_bfloat16_bundle_is_refused_with_the_remedy(model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no bfloat16; export with --dtype float16 or float32") as refusal:
        exported(model, tmp_path / "b", bos=BOS, dtype="bfloat16")
    assert str(tmp_path / "b") in str(refusal.value)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_a_missing_file_is_named(model: TinyModel, tmp_path: Path, name: str) -> None:
    exported(model, tmp_path / "b", bos=BOS)
    (tmp_path / "b" / name).unlink()
    with pytest.raises(EngineError, match=f"b/{name}: this file is missing; export the bundle again"):
        open_bundle(tmp_path / "b")


def test_a_missing_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"cannot read the manifest .*; is .* a bundle\?"):
        open_bundle(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a graph", None])
def test_a_damaged_graph_is_one_line(model: TinyModel, tmp_path: Path, content: bytes | None) -> None:
    exported(model, tmp_path / "b", bos=BOS)
    graph = tmp_path / "b" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-100] if content is None else content)
    with pytest.raises(EngineError, match="ONNX Runtime refuses the graph: ") as refusal:
        open_bundle(tmp_path / "b")
    assert "\n" not in str(refusal.value)


def test_truncated_weights_are_refused(model: TinyModel, tmp_path: Path) -> None:
    exported(model, tmp_path / "b", bos=BOS)
    data = tmp_path / "b" / "model.onnx.data"
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(EngineError, match="refuses the graph"):
        open_bundle(tmp_path / "b")


def test_a_session_leaves_the_thread_as_it_was(model: TinyModel, content: NDArray[np.int64], tmp_path: Path) -> None:
    """Denormals are flushed for the session alone: other computations of the thread must not change."""
    denormal = np.float32(1e-40)
    session = exported(model, tmp_path / "b", bos=1)
    assert denormal * np.float32(1) != 0
    with denormals_flushed():
        assert denormal * np.float32(1) == 0
    session.prefill(content)
    assert denormal * np.float32(1) != 0
