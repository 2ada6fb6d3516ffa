"""The head: quantized or not, of all tokens or of the last one, against transformers and integer arithmetic."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from spike_export.artifacts.errors import EngineError
from spike_export.artifacts.manifest import LAST_TOKEN_NODE, LogitsScope, Manifest
from spike_export.artifacts.recipe import Dtype, HeadScheme, Recipe, Scheme
from spike_export.calibration.corpus.corpus import Corpus
from spike_export.calibration.decoder.layerwise import Decoder, Execution
from spike_export.calibration.decoder.perplexity import model_perplexity
from spike_export.calibration.decoder.simulate import QuantizedWeights, Simulation
from spike_export.checkpoint.checkpoint import LM_HEAD
from spike_export.engines.accuracy.variants import Variant, check_variants
from spike_export.engines.onnx_runtime.session import open_bundle
from spike_export.export.bundle import ExportOptions, export_bundle
from tests.support.tiny.models import CachedSession, TinyModel, input_scales, tiny_llama, tiny_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

PREFIX = (5, 1, 9)

QUANTIZED: tuple[HeadScheme, ...] = ("int8-weights", "int8-per-token-dynamic")

VOCABULARY, HIDDEN = 99, 48


def tokens(batch: int = 2, length: int = 19, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(3, VOCABULARY, (batch, length))


def recipe_with(model: TinyModel, head: HeadScheme, *, kept: bool = True, prefix: tuple[int, ...] = ()) -> Recipe:
    """Return a recipe whose decoder stays in float32 (or is INT8), so that what differs is the head's."""
    scales = input_scales(model, tokens(4, 40))
    plans: dict[str, Dtype] = dict.fromkeys(scales, "float32") if kept else {}
    return tiny_recipe(
        model.checkpoint, scales, kept=plans, prefix=prefix, scheme=Scheme(head=head, unquantized="float32")
    )


def exported(
    folder: Path, model: TinyModel, recipe: Recipe | None, logits: LogitsScope = "all", dtype: Dtype = "float32"
) -> Manifest:
    return export_bundle(model.checkpoint, recipe, ExportOptions(dtype, logits=logits), folder)


def final_states(model: TinyModel, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return what transformers' head reads: the normed states [batch, sequence, hidden]."""
    states: NDArray[np.float32] = model.reference.model(torch.from_numpy(ids)).last_hidden_state.numpy()
    return states


def integer_head(states: NDArray[np.float32], weight: NDArray[np.float32], head: HeadScheme) -> NDArray[np.float64]:
    """Return the logits written out: whole numbers are multiplied, and the steps afterwards."""
    step = (np.abs(weight).max(axis=1) / np.float32(127)).astype(np.float32)
    rows = np.rint(weight / step[:, None]).astype(np.float64)
    if head == "int8-weights":
        return np.asarray(states.astype(np.float64) @ rows.T * step)
    token_step = (np.abs(states).max(axis=-1, keepdims=True) / np.float32(127)).astype(np.float32)
    return np.asarray(np.rint(states / token_step).astype(np.float64) @ rows.T * step * token_step)


def tolerance(head: HeadScheme, states: NDArray[np.float32], weight: NDArray[np.float32]) -> float:
    """Return the largest error of one logit.

    Float32 states of two summation orders differ by 1e-6 of their size. One rounding flip of a token moves one of its
    channels by a step, 1 / 127 of the largest. With INT8 weights alone ONNX Runtime quantizes the input in blocks of 32
    channels, each by its largest / 127: half a step at most in every channel, of errors that add up as a random walk.
    """
    largest, row = np.abs(states).max(), float(np.abs(weight).max())
    flips = 2 if head == "int8-per-token-dynamic" else 0.5 * np.sqrt(HIDDEN)
    return float(flips * largest / 127 * row)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("head", QUANTIZED)
def test_the_simulated_head_is_integer_arithmetic(head: HeadScheme, tie: bool) -> None:
    model = tiny_llama(tie=tie)
    weight, ids = model.checkpoint.tensor(LM_HEAD), tokens()
    for execution in (Execution(), Execution(resident=False)):
        decoder = Decoder(model.checkpoint, execution)
        states = decoder.run(ids).get(0)
        normed = decoder.head()._norm(states).numpy()
        expected = integer_head(normed, weight, head)
        # Twice: the second head takes the quantized weight that the first one left.
        for _ in range(2):
            actual = decoder.head(head).logits(states).numpy()
            # A float32 sum of 48 products: each partial sum is rounded to 2^-24 of its size.
            largest = np.abs(normed).max() * np.abs(weight).sum(1).max()
            assert np.abs(actual - expected).max() <= HIDDEN * 2.0**-24 * largest
        other = integer_head(normed, weight, QUANTIZED[1 - QUANTIZED.index(head)])
        assert np.abs(actual - other).max() > 1e-3
        assert np.abs(actual - decoder.head().logits(states).numpy()).max() > 1e-3


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("head", QUANTIZED)
def test_a_quantized_head_in_the_graph(tmp_path: Path, head: HeadScheme, tie: bool) -> None:
    model, ids = tiny_llama(tie=tie), tokens()
    manifest = exported(tmp_path, model, recipe_with(model, head))
    weight, states = model.checkpoint.tensor(LM_HEAD), final_states(model, ids)
    expected, allowed = integer_head(states, weight, head), tolerance(head, states, weight)
    session = CachedSession(tmp_path)
    for chunks in [(), (7, 1, 11), (1,) * 19]:
        assert np.abs(session.run(ids, chunks) - expected).max() <= allowed
    # Its own weight: one byte each, and a scale and a zero point per row, beside a tied embedding too.
    assert manifest.head is not None
    assert manifest.head.weight_bytes == VOCABULARY * (HIDDEN + 4 + 1)
    assert manifest.head.format == ("int8" if head == "int8-per-token-dynamic" else "float32+int8-weights")
    assert sum(manifest.linears[kind].mac_share for kind in manifest.linears) == pytest.approx(1)
    macs = VOCABULARY * HIDDEN
    linears = sum(
        tensor.size
        for name, tensor in model.checkpoint.tensors.tensors.items()  # type: ignore[attr-defined]
        if name.endswith("proj.weight")
    )
    assert manifest.head.mac_share == pytest.approx(macs / (macs + linears))


@pytest.mark.parametrize(
    ("head", "name", "factor"),
    [
        ("int8-weights", "lm_head.weight_scale", 1.2),
        ("int8-per-token-dynamic", "lm_head.weight_scale", 1.2),
        ("int8-per-token-dynamic", "float32.127.0", 100 / 127),
    ],
)
def test_a_planted_fault_of_the_head_is_noticed(tmp_path: Path, head: HeadScheme, name: str, factor: float) -> None:
    model, ids = tiny_llama(), tokens()
    exported(tmp_path, model, recipe_with(model, head))
    graph = onnx.load(tmp_path / "model.onnx")
    tensor = next(tensor for tensor in graph.graph.initializer if tensor.name == name)
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(factor), name))
    onnx.save(graph, tmp_path / "model.onnx")
    weight, states = model.checkpoint.tensor(LM_HEAD), final_states(model, ids)
    wrong = np.abs(CachedSession(tmp_path).run(ids) - integer_head(states, weight, head)).max()
    assert wrong > tolerance(head, states, weight)


def test_an_unquantized_head_reads_a_tied_embedding_or_its_own_weight(tmp_path: Path) -> None:
    for tie, size in ((True, 0), (False, 2 * VOCABULARY * HIDDEN)):
        model = tiny_llama(tie=tie)
        manifest = exported(tmp_path / str(tie), model, None, dtype="float16")
        assert manifest.head is not None
        assert (manifest.head.format, manifest.head.weight_bytes) == ("float16", size)


FUSED: Mapping[HeadScheme, str] = {"int8-weights": "MatMulNBits", "int8-per-token-dynamic": "MatMulIntegerToFloat"}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("head", QUANTIZED)
def test_onnx_runtime_fuses_the_head_in_every_precision(tmp_path: Path, head: HeadScheme, dtype: Dtype) -> None:
    model = tiny_llama(tie=True)
    recipe = recipe_with(model, head)
    exported(tmp_path / "bundle", model, recipe, dtype=dtype)
    CachedSession(tmp_path / "bundle", tmp_path / "optimized.onnx")
    nodes = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    kinds = Counter(node.op_type for node in nodes)
    assert kinds[FUSED[head]] == 1
    assert kinds["DequantizeLinear"] == 0


@pytest.mark.parametrize("prefix", [(), PREFIX])
@pytest.mark.parametrize("head", ["unquantized", *QUANTIZED])
def test_last_token_logits_are_the_last_of_all(tmp_path: Path, head: HeadScheme, prefix: tuple[int, ...]) -> None:
    model, ids = tiny_llama(), tokens()
    recipe = recipe_with(model, head, kept=False, prefix=prefix)
    every, last = tmp_path / "all", tmp_path / "last"
    assert exported(every, model, recipe).logits == "all"
    manifest = exported(last, model, recipe, "last")
    assert manifest.logits == "last"
    assert next(value.shape for value in manifest.outputs if value.name == "logits") == ("batch", 1, VOCABULARY)
    for chunks in [(), (7, 1, 11), (1,) * 19]:
        expected = CachedSession(every).run(ids, chunks)
        ends = np.cumsum(chunks) - 1 if chunks else np.array([18])
        actual = CachedSession(last).run(ids, chunks)
        assert actual.shape == (2, len(ends), VOCABULARY)
        # The same arithmetic on the same rows; only a matrix product's row blocks may differ: 48 terms of 6e-8.
        assert np.abs(actual - expected[:, ends]).max() <= 5e-6 * np.abs(expected).max()


def test_last_token_logits_of_a_batch_padded_on_the_left_are_each_rows_last(tmp_path: Path) -> None:
    model, lengths = tiny_llama(), (19, 4)
    exported(tmp_path, model, None, "last")
    rows = [tokens(1, length, seed=length) for length in lengths]
    ids, mask = np.full((2, 19), 3), np.zeros((2, 19), np.int64)
    for row, own in enumerate(rows):
        ids[row, 19 - own.shape[1] :], mask[row, 19 - own.shape[1] :] = own[0], 1
    session = CachedSession(tmp_path)
    session.reset(2)
    actual = session.step(ids, mask)
    for row, own in enumerate(rows):
        expected = model.reference(torch.from_numpy(own)).logits.numpy()[:, -1]
        assert np.abs(actual[row] - expected).max() <= 2e-5 * np.abs(expected).max()
    # Another row's last token would be something else.
    assert np.abs(actual[0] - actual[1]).max() > 1e-2


def test_all_logits_of_a_last_token_bundle_are_those_of_the_whole_graph(tmp_path: Path) -> None:
    model, ids = tiny_llama(), tokens()
    recipe = recipe_with(model, "int8-per-token-dynamic", kept=False, prefix=PREFIX)
    exported(tmp_path / "all", model, recipe)
    exported(tmp_path / "last", model, recipe, "last")
    expected = open_bundle(tmp_path / "all").prefill(ids)
    assert open_bundle(tmp_path / "last").prefill(ids).shape == (2, 1, VOCABULARY)
    np.testing.assert_array_equal(open_bundle(tmp_path / "last", all_logits=True).prefill(ids), expected)
    np.testing.assert_array_equal(open_bundle(tmp_path / "all", all_logits=True).prefill(ids), expected)
    assert sorted(path.name for path in (tmp_path / "last").glob("model*")) == ["model.onnx", "model.onnx.data"]


def test_a_changed_last_token_graph_is_refused_by_name(tmp_path: Path) -> None:
    exported(tmp_path, tiny_llama(), None, "last")
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    next(node for node in graph.graph.node if node.name == LAST_TOKEN_NODE).name = "renamed"
    (tmp_path / "model.onnx").write_bytes(graph.SerializeToString())
    with pytest.raises(EngineError, match=f"no node is named {LAST_TOKEN_NODE}"):
        open_bundle(tmp_path, all_logits=True)


@pytest.mark.parametrize("head", QUANTIZED)
def test_the_check_of_a_last_token_bundle_meets_the_simulated_perplexity(tmp_path: Path, head: HeadScheme) -> None:
    model, content = tiny_llama(), tokens(6, 40)
    checkpoint = model.checkpoint
    assert checkpoint.bos_token_id in PREFIX
    recipe = recipe_with(model, head, kept=False, prefix=PREFIX)
    exported(tmp_path, model, recipe, "last")
    plain = recipe.model_copy(update={"scheme": recipe.scheme.model_copy(update={"head": "unquantized"})})
    check = check_variants(
        checkpoint,
        lambda: Decoder(checkpoint),
        Corpus("none", ("x",)),
        content,
        [Variant("before", plain), Variant("shipped", recipe, tmp_path)],
        ExportOptions("float32", logits="last"),
    )
    simulation = Simulation(recipe.modules, QuantizedWeights(recipe.scheme.weights))

    def predicted(scheme: HeadScheme) -> float:
        decoder, visits = Decoder(checkpoint), (simulation.visit,)
        return model_perplexity(decoder, content, 40, PREFIX, visits, head=scheme)

    before, shipped = check.variants
    assert (before.head, shipped.head) == ("float32", "int8" if "token" in head else "float32+int8-weights")
    assert before.perplexity == pytest.approx(predicted("unquantized"), rel=1e-3)
    assert shipped.perplexity == pytest.approx(predicted(head), rel=1e-3)
    assert shipped.kl_divergence != before.kl_divergence
