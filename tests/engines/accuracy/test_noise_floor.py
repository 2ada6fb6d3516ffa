"""The noise floor is measured on the bundle itself, with scaled embeddings and nothing else changed."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from spike_export.artifacts.errors import EngineError
from spike_export.artifacts.manifest import GRAPH_FILE
from spike_export.artifacts.recipe import Dtype
from spike_export.calibration.decoder.layerwise import Decoder
from spike_export.calibration.decoder.perplexity import with_bos
from spike_export.engines.accuracy.comparison import references
from spike_export.engines.accuracy.distances import Accuracy, distances
from spike_export.engines.accuracy.noise_floor import NOISE_WINDOWS, noise_floor
from spike_export.engines.accuracy.predictions import predictions
from spike_export.engines.onnx_runtime.nudged_embeddings import open_nudged
from spike_export.engines.onnx_runtime.session import open_bundle
from spike_export.export.bundle import ExportOptions, export_bundle
from tests.support.graph_parity import assert_close
from tests.support.tiny.models import TinyModel, input_scales, model_with_bos, tiny_llama, tiny_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

BOS, WIDTH = 1, 48
CONTENT = np.random.default_rng(0).integers(3, 99, (NOISE_WINDOWS + 1, 24))


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return model_with_bos(tiny_llama(tie=True), BOS)


def exported(model: TinyModel, folder: Path, dtype: Dtype = "float32", *, quantized: bool = True) -> Path:
    recipe = tiny_recipe(model.checkpoint, input_scales(model, CONTENT)) if quantized else None
    export_bundle(model.checkpoint, recipe, ExportOptions(dtype), folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_embeddings_scaled_by_one_give_the_bundles_own_logits(model: TinyModel, tmp_path: Path, dtype: Dtype) -> None:
    bundle = exported(model, tmp_path / "bundle", dtype)
    own = open_bundle(bundle).prefill(CONTENT[:1])[0, :-1]
    np.testing.assert_array_equal(open_nudged(bundle).logits(CONTENT[0]), own)


def test_scaled_embeddings_are_those_of_transformers_and_leave_the_head(model: TinyModel, tmp_path: Path) -> None:
    scales = np.random.default_rng(1).uniform(0.5, 1.5, WIDTH)
    reference = model.reference
    fed = torch.from_numpy(with_bos(CONTENT[:1], BOS))
    with torch.inference_mode():
        embedded = reference.get_input_embeddings()(fed) * torch.from_numpy(scales).float()
        expected = reference(inputs_embeds=embedded).logits[0, 1:-1].numpy()
    bundle = exported(model, tmp_path / "bundle", quantized=False)
    assert_close(open_nudged(bundle).logits(CONTENT[0], scales), expected)


def test_the_figures_are_those_of_the_two_graphs(model: TinyModel, tmp_path: Path) -> None:
    bundle = exported(model, tmp_path / "bundle")
    told: list[tuple[int, int]] = []
    with references(lambda: Decoder(model.checkpoint), [(CONTENT, ())], BOS) as (reference,):
        found = noise_floor(bundle, reference, lambda _, done, total: told.append((done, total)))
        nudged, signs = open_nudged(bundle), np.random.default_rng(0).choice([-1.0, 1.0], WIDTH)
        pairs = [(nudged.logits(each), nudged.logits(each, 1 + 1e-6 * signs)) for each in CONTENT[:NOISE_WINDOWS]]
        rows = [reference.window(index) for index in range(NOISE_WINDOWS)]
    targets = CONTENT[:NOISE_WINDOWS, 1:]
    plain, moved = (perplexity([pair[side] for pair in pairs], targets) for side in (0, 1))
    assert (found.nudge, found.windows) == (1e-6, NOISE_WINDOWS)
    assert found.increase.mean == pytest.approx(moved / plain - 1, rel=1e-6)
    kept = [predictions(pair[0], each) for pair, each in zip(pairs, targets, strict=True)]
    apart = Accuracy(tuple(map(distances, kept, [pair[1] for pair in pairs], targets)))
    assert found.divergence.mean == pytest.approx(apart.divergence.mean, rel=1e-9)
    assert found.top1_agreement.mean == apart.top1_agreement.mean
    from_model = [Accuracy(tuple(map(distances, rows, [pair[side] for pair in pairs], targets))) for side in (0, 1)]
    change = from_model[1].divergence.mean - from_model[0].divergence.mean
    assert found.divergence_change.mean == pytest.approx(change, rel=1e-6)
    assert told == [(done, NOISE_WINDOWS) for done in range(1, NOISE_WINDOWS + 1)]


def perplexity(logits: list[NDArray[np.float32]], targets: NDArray[np.int64]) -> float:
    rows = torch.from_numpy(np.concatenate(logits)).double()
    return float(torch.nn.functional.cross_entropy(rows, torch.from_numpy(targets.ravel())).exp())


def test_without_rounding_to_8_bit_a_nudge_stays_a_nudge(model: TinyModel, tmp_path: Path) -> None:
    with references(lambda: Decoder(model.checkpoint), [(CONTENT[:2], ())], BOS) as (reference,):
        found = noise_floor(exported(model, tmp_path / "bundle", quantized=False), reference)
    assert 0 < found.divergence.mean < 1e-9
    assert abs(found.increase.mean) < 1e-5
    assert found.top1_agreement.mean == 1


def test_float16_is_nudged_by_one_rounding(model: TinyModel, tmp_path: Path) -> None:
    """A nudge of 1e-6 would be none there."""
    with references(lambda: Decoder(model.checkpoint), [(CONTENT[:1], ())], BOS) as (reference,):
        found = noise_floor(exported(model, tmp_path / "bundle", "float16"), reference)
    assert found.nudge == 2.0**-10
    assert found.divergence.mean > 0


def test_a_graph_without_its_embedding_is_refused(model: TinyModel, tmp_path: Path) -> None:
    bundle = exported(model, tmp_path / "bundle")
    graph = onnx.load(bundle / GRAPH_FILE, load_external_data=False)
    next(node for node in graph.graph.node if node.op_type == "Gather" and "embed" in node.name).name = "other"
    onnx.save(graph, bundle / GRAPH_FILE)
    with pytest.raises(EngineError, match=r"model\.onnx: the graph has no embedding; it was changed, export"):
        open_nudged(bundle)
