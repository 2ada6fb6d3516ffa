"""What a call clips is counted as numpy counts it, and counting changes no logits."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from spike_export.artifacts.errors import EngineError
from spike_export.artifacts.manifest import GRAPH_FILE
from spike_export.engines.onnx_runtime.clipped_activations import GROUPS, ClippedActivations, count_clipped
from spike_export.engines.onnx_runtime.session import open_for_generation, session_options
from spike_export.engines.onnx_runtime.slots import open_slots
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.cache_options import CacheOptions
from tests.support.tiny.models import TinyModel, input_scales, tiny_llama, tiny_recipe, unquantized_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

PER_TOKEN = "model.layers.0.self_attn.o_proj"
PROMPT = np.random.default_rng(0).integers(3, 99, 20)


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return tiny_llama()


@pytest.fixture(scope="module")
def bundle(model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose scales cover a third of what its inputs reach; one input has a scale per token."""
    scales = {name: scale / 3 for name, scale in input_scales(model, PROMPT[None]).items()}
    folder = tmp_path_factory.mktemp("clipped")
    options = ExportOptions("float32", logits="last", cache=CacheOptions("static", 64))
    recipe = tiny_recipe(model.checkpoint, scales, prefix=(5, 1))
    own = {"activation_scale": None, "activations": "per-token"}
    modules = recipe.modules | {PER_TOKEN: recipe.modules[PER_TOKEN].model_copy(update=own)}
    export_bundle(model.checkpoint, recipe.model_copy(update={"modules": modules}), options, folder)
    return folder


def counted(bundle: Path, tokens: NDArray[np.int64]) -> dict[str, tuple[int, int]]:
    """Return what numpy counts in a fresh sequence, from the bundle's own graph with its activations as outputs."""
    graph = onnx.load(bundle / GRAPH_FILE)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    quantizers = [node for node in graph.graph.node if node.op_type == "QuantizeLinear"]
    quantized = {node.input[0]: node for node in quantizers if not node.name.startswith(PER_TOKEN)}
    graph.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in quantized)
    session = ort.InferenceSession(graph.SerializeToString(), session_options(1))
    kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(bool)": np.bool_}
    sizes = {"input_ids": (1, len(tokens)), "write_indices": (1,), "fresh": (1,)}
    feeds = {
        value.name: np.zeros(sizes.get(value.name) or (1, *value.shape[1:]), kinds[value.type])
        for value in session.get_inputs()
    }
    feeds["input_ids"] = tokens[None]
    found = dict.fromkeys(dict.fromkeys(GROUPS.values()), (0, 0))
    for (_, node), values in zip(quantized.items(), session.run(list(quantized), feeds), strict=True):
        group = GROUPS[node.name.split(".")[-2]]
        rounded = np.rint(values / constants[node.input[1]])
        beyond = int(((rounded < -128) | (rounded > 127)).sum())
        found[group] = (found[group][0] + beyond, found[group][1] + values.size)
    return found


def test_counts_are_those_of_numpy_and_logits_stay(bundle: Path) -> None:
    expected = counted(bundle, PROMPT)
    assert all(0 < beyond < values for beyond, values in expected.values()), "the case is worth it"
    plain = open_slots(open_for_generation(bundle, 1), 2)
    slots = open_slots(open_for_generation(bundle, 1, sample_clipping=1.0), 2)
    np.testing.assert_array_equal(slots.admit(0, PROMPT), plain.admit(0, PROMPT))
    assert slots.clipped == expected  # type: ignore[attr-defined]
    for each in (plain, slots):
        each.admit(1, PROMPT[:3])
    before = dict(slots.clipped)  # type: ignore[attr-defined]
    # A row that gets padding in a step: nothing is counted.
    np.testing.assert_array_equal(slots.step([1], PROMPT[:1]), plain.step([1], PROMPT[:1]))
    assert slots.clipped == before  # type: ignore[attr-defined]
    np.testing.assert_array_equal(slots.step([0, 1], PROMPT[:2]), plain.step([0, 1], PROMPT[:2]))
    assert slots.clipped["o_proj"][1] > before["o_proj"][1]  # type: ignore[attr-defined]


def test_a_share_of_the_calls_counts(bundle: Path) -> None:
    slots = open_slots(open_for_generation(bundle, 1, sample_clipping=0.25), 1)
    slots.admit(0, PROMPT[:1])
    for token in [*PROMPT[1:], *PROMPT[1:]]:
        slots.step([0], np.array([token]))
    calls = slots.clipped["down_proj"][1] / counted(bundle, PROMPT[:1])["down_proj"][1]  # type: ignore[attr-defined]
    assert 0 < calls < len(PROMPT)


def test_where_nothing_can_be_counted(model: TinyModel, bundle: Path, tmp_path: Path) -> None:
    for share in (-0.1, 1.1):
        with pytest.raises(EngineError, match=f"are counted in {share} of the calls; expected 0 to 1"):
            ClippedActivations(("o_proj",), share)
    options = ExportOptions("float32", cache=CacheOptions("static", 64))
    export_bundle(model.checkpoint, unquantized_recipe(model.checkpoint), options, tmp_path / "float")
    with pytest.raises(EngineError, match="no activation has a static INT8 scale"):
        count_clipped(onnx.load(tmp_path / "float" / GRAPH_FILE).graph, tmp_path / "float")
    export_bundle(
        model.checkpoint, unquantized_recipe(model.checkpoint), ExportOptions("float32"), tmp_path / "growing"
    )
    with pytest.raises(EngineError, match="over a static cache; export with --kv-cache static"):
        open_for_generation(tmp_path / "growing", 1, sample_clipping=0.5)
