"""Clipped values are those that numpy counts, and the graph without clipping differs by the clipping alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from spike_export.artifacts.errors import EngineError
from spike_export.artifacts.manifest import GRAPH_FILE
from spike_export.calibration.decoder.perplexity import with_bos
from spike_export.engines.accuracy.clipping import DUE, measure_clipping
from spike_export.engines.accuracy.intervals import Interval
from spike_export.engines.onnx_runtime.lifted_clipping import lift_clipping
from spike_export.engines.onnx_runtime.session import open_graph
from spike_export.engines.onnx_runtime.taps import Station, all_logits_model, fresh_feeds, open_tapped
from spike_export.export.bundle import ExportOptions, export_bundle
from tests.support.tiny.models import TinyModel, input_scales, tiny_llama, tiny_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

CONTENT = np.random.default_rng(0).integers(3, 99, (3, 24))
MODULE = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return tiny_llama()


def exported(model: TinyModel, folder: Path, share: float) -> Path:
    """Write a bundle whose scale of one input covers a share of what the input reaches on the text."""
    scales = input_scales(model, CONTENT)
    recipe = tiny_recipe(model.checkpoint, {**scales, MODULE: scales[MODULE] * share})
    export_bundle(model.checkpoint, recipe, ExportOptions("float32"), folder)
    return folder


def constants(bundle: Path) -> dict[str, NDArray[np.generic]]:
    graph = onnx.load(bundle / GRAPH_FILE).graph
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def test_the_module_that_saturates_is_named_with_numpys_count(model: TinyModel, tmp_path: Path) -> None:
    bundle = exported(model, tmp_path / "bundle", 0.1)
    found = measure_clipping(bundle, "text", CONTENT)
    values = open_tapped(bundle, [MODULE], 2).run(with_bos(CONTENT, model.checkpoint.bos_token_id))[
        Station(MODULE, "input")
    ]
    steps = values / constants(bundle)[f"{MODULE}.input_scale"]
    first, second = found.inputs[:2]
    assert (first.module, first.clipped) == (MODULE, np.count_nonzero((steps < -128.5) | (steps > 127.5)))
    assert first.values == values.size
    assert second.share < 0.01 < first.share
    assert (found.windows, found.length) == CONTENT.shape


def test_nothing_is_due_where_the_scales_cover_the_text(model: TinyModel, tmp_path: Path) -> None:
    """Rounding upstream moves values a little, so that the largest may be clipped by a hair."""
    found = measure_clipping(exported(model, tmp_path / "bundle", 1.5), "text", CONTENT)
    assert found.share < 1e-3
    assert abs(found.cost.mean) < 1e-3
    assert not found.due


def test_the_graph_without_clipping_adds_the_excess_and_nothing_else(model: TinyModel, tmp_path: Path) -> None:
    bundle = exported(model, tmp_path / "bundle", 0.1)
    proto = all_logits_model(bundle)
    lift_clipping(proto.graph, bundle)
    names = [next(node.input[0] for node in proto.graph.node if node.name == f"{MODULE}.QuantizeLinear")]
    names.append(next(node.output[0] for node in proto.graph.node if node.name == f"{MODULE}.MatMul"))
    proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    session = open_graph(bundle, proto.SerializeToString())
    x, product = session.session.run(names, fresh_feeds(session, CONTENT))
    known = constants(bundle)
    scale, weight = (
        np.float64(known[f"{MODULE}.input_scale"]),
        known[f"{MODULE}.weight"] * known[f"{MODULE}.weight_scale"],
    )
    seen = np.clip(np.rint(x / np.float32(scale)), -128, 127) * scale + x - np.clip(x, -128 * scale, 127 * scale)
    assert np.abs(seen - x).max() <= scale * 0.5001, "only the rounding is left"
    np.testing.assert_allclose(product, seen @ weight, rtol=0, atol=1e-5 * np.abs(product).max())


def test_calibrating_anew_is_due_where_the_whole_interval_is_above_the_limit(model: TinyModel, tmp_path: Path) -> None:
    found = measure_clipping(exported(model, tmp_path / "bundle", 0.1), "text", CONTENT)
    for mean, margin, due in ((0.02, 0.01, True), (0.02, 0.016, False), (DUE, 0.0, False), (-0.02, 0.01, False)):
        changed = replace(found, cost=Interval(mean, margin))
        assert changed.due is due


def test_a_bundle_without_static_scales_is_refused(model: TinyModel, tmp_path: Path) -> None:
    export_bundle(model.checkpoint, None, ExportOptions("float32"), tmp_path / "bundle")
    with pytest.raises(EngineError, match="no activation has a static INT8 scale"):
        measure_clipping(tmp_path / "bundle", "text", CONTENT)
