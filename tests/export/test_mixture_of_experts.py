"""Mixtures of experts in the graph: against transformers, against the simulation, and where a router is awkward."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray

from spike_export.artifacts.errors import RecipeError
from spike_export.artifacts.manifest import load_manifest
from spike_export.artifacts.recipe import (
    ActivationKind,
    Dtype,
    ModulePlan,
    NumberFormat,
    Prefix,
    Recipe,
    Scheme,
    WeightScheme,
    activation_scale,
)
from spike_export.calibration.decoder.equivalent.equivalent_weights import equivalent_checkpoint
from spike_export.calibration.decoder.equivalent.smoothing import smoothing_plan
from spike_export.calibration.decoder.layerwise import Decoder
from spike_export.calibration.decoder.simulate import QuantizedWeights, Simulation
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.checkpoint.decoder_config import tensor_shapes
from spike_export.checkpoint.modules import is_router, linears
from spike_export.checkpoint.opening import open_checkpoint
from spike_export.engines.plan.branches import inline_branches
from spike_export.engines.plan.graph import load_graph
from spike_export.export.bundle import ExportOptions, export_bundle
from tests.support.graph_parity import PARITY, assert_close, reference_logits
from tests.support.tiny.families import MIXTURES, checkpoint_of, replaced, tiny_family, tokens
from tests.support.tiny.models import CachedSession, TinyModel, tiny_recipe, unquantized_recipe

PREFIX = (5, 1, 9)
CHUNKS = ((), (7, 1, 11), (1,) * 19)
"""Prefill, chunked prefill, decode; all longer than Mixtral's window of 9."""

FLIP = 1e-2
"""Part of the logits' scale by which INT8 may differ: where two summation orders straddle a rounding boundary, one
value moves by a step (1 / 127 of its range)."""


def mixture(name: str, **changes: Any) -> TinyModel:
    return tiny_family(name, attention="eager", num_hidden_layers=2, **changes)


def block(name: str, layer: int) -> str:
    return f"model.layers.{layer}." + {"mixtral": "block_sparse_moe", "qwen3_moe": "mlp"}[name]


def expert(name: str, layer: int, index: int, linear: str) -> str:
    """Return the HF name of an expert's `gate`, `up` or `down`."""
    own = {"mixtral": {"gate": "w1", "up": "w3", "down": "w2"}}.get(name, {}).get(linear, f"{linear}_proj")
    return f"{block(name, layer)}.experts.{index}.{own}"


VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "mixtral-one-expert": ("mixtral", {"num_experts_per_tok": 1}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe-renormalized": ("qwen3_moe", {"norm_topk_prob": True}),
    "qwen3_moe-window": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 9, "attention_bias": True}),
}


@pytest.mark.parametrize("prefix", [(), PREFIX], ids=["plain", "prefix"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill_chunks_and_decode_equal_transformers(tmp_path: Path, variant: str, prefix: tuple[int, ...]) -> None:
    name, changes = VARIANTS[variant]
    model, ids = mixture(name, **changes), tokens(2, 19)
    recipe = unquantized_recipe(model.checkpoint, prefix) if prefix else None
    export_bundle(model.checkpoint, recipe, ExportOptions("float32"), tmp_path / "b")
    expected = reference_logits(model, ids, prefix)
    session = CachedSession(tmp_path / "b")
    for chunks in CHUNKS:
        assert_close(session.run(ids, chunks), expected)


def test_shares_that_are_not_renormalized_matter() -> None:
    """Must differ, or the two variants above would prove nothing."""
    plain, divided = (
        reference_logits(mixture("qwen3_moe", norm_topk_prob=flag), tokens(2, 19)) for flag in (False, True)
    )
    assert np.abs(plain - divided).max() > 0.01 * np.abs(plain).max()


@pytest.mark.parametrize("name", MIXTURES)
def test_left_padded_rows_equal_the_rows_alone(tmp_path: Path, name: str) -> None:
    model, ids, pads = mixture(name), tokens(3, 14), (0, 3, 9)
    recipe = unquantized_recipe(model.checkpoint, PREFIX)
    export_bundle(model.checkpoint, recipe, ExportOptions("float32"), tmp_path / "b")
    mask = (np.arange(14)[None] >= np.array(pads)[:, None]).astype(np.int64)
    graph = CachedSession(tmp_path / "b")
    graph.reset(3)
    steps = [(0, 10), *((start, start + 1) for start in range(10, 14))]
    actual = np.concatenate([graph.step(ids[:, start:end], mask[:, :end]) for start, end in steps], axis=1)
    for row, pad in enumerate(pads):
        assert_close(actual[row : row + 1, pad:], reference_logits(model, ids[row : row + 1, pad:], PREFIX))


@dataclass(frozen=True)
class Case:
    """How a case quantizes; `expert` is the plan of one whole expert."""

    per_token: bool = False
    weight_only: bool = False
    expert: ModulePlan | None = None
    smoothed: bool = False
    prefix: tuple[int, ...] = ()
    weights: WeightScheme = "int8-per-channel"


SCHEMES: Mapping[str, Case] = {
    "static": Case(),
    "static-tensor-prefix": Case(weights="int8-per-tensor", prefix=PREFIX),
    "token": Case(per_token=True),
    "weights": Case(weight_only=True),
    "kept-expert": Case(expert=ModulePlan(precision="float32", ratio=900.5, reason="test"), prefix=PREFIX),
    "w8a16-expert": Case(per_token=True, expert=ModulePlan(precision="float32", weights="int8")),
    "smoothed": Case(smoothed=True, prefix=PREFIX),
}


def measured(checkpoint: Checkpoint, prefix: tuple[int, ...]) -> dict[str, float]:
    """Steps of every linear's input; an expert's over the tokens that it is given."""
    peaks: dict[str, float] = dict.fromkeys(linears(checkpoint.config), 0.01)

    @contextmanager
    def observe(index: int, layer: Any) -> Iterator[None]:
        def note(name: str, values: torch.Tensor) -> None:
            peaks[name] = max(peaks[name], values.abs().max().item())

        handles = [
            layer.get_submodule(name.split(".", 3)[3]).register_forward_pre_hook(
                lambda _, inputs, name=name: note(name, inputs[0])
            )
            for name in peaks
            if name.startswith(f"model.layers.{index}.")
        ]
        yield
        for handle in handles:
            handle.remove()

    Decoder(checkpoint).run(tokens(), prefix, visits=(observe,))
    return {name: activation_scale(peak) for name, peak in peaks.items()}


def recipe_of(name: str, case: Case, checkpoint: Checkpoint, dtype: Dtype = "float32") -> Recipe:
    smoothing = {}
    if case.smoothed:
        random, config = np.random.default_rng(7), checkpoint.config
        widths = {expert(name, 0, 1, "up"): 48, expert(name, 1, 1, "down"): config.expert_size}
        smoothing = {
            module: smoothing_plan("smoothquant", 0.5, np.exp2(random.uniform(-2, 2, width)).astype(np.float32))
            for module, width in widths.items()
        }
    steps = measured(equivalent_checkpoint(checkpoint, None, smoothing), case.prefix)
    plans = {}
    for module, step in steps.items():
        if is_router(module):
            plans[module] = ModulePlan(precision="float32", reason="router")
        elif case.weight_only:
            plans[module] = ModulePlan(precision=dtype, weights="int8")
        elif case.expert is not None and f"{block(name, 1)}.experts.2." in module:
            plans[module] = case.expert
        else:
            kind: ActivationKind = "per-token" if case.per_token else "static"
            plans[module] = ModulePlan(precision="int8", activations=kind, activation_scale=step)
    scheme = Scheme(weights=case.weights)
    base = tiny_recipe(checkpoint, steps)
    prefix = Prefix(token_ids=case.prefix, text="?", ratio=1.0) if case.prefix else None
    return base.model_copy(update={"scheme": scheme, "prefix": prefix, "modules": plans, "smoothing": smoothing})


def simulated(checkpoint: Checkpoint, recipe: Recipe) -> NDArray[np.float32]:
    decoder = Decoder(equivalent_checkpoint(checkpoint, None, recipe.smoothing))
    simulation = Simulation(recipe.modules, QuantizedWeights(recipe.scheme.weights))
    states = decoder.run(tokens(), recipe.prefix_ids, visits=(simulation.visit,))
    logits: NDArray[np.float32] = decoder.head().logits(states.get(0)).numpy()
    return logits


@pytest.mark.parametrize("case", SCHEMES)
@pytest.mark.parametrize("name", MIXTURES)
def test_float32_graph_equals_the_simulation(tmp_path: Path, name: str, case: str) -> None:
    checkpoint = mixture(name).checkpoint
    recipe = recipe_of(name, SCHEMES[case], checkpoint)
    export_bundle(checkpoint, recipe, ExportOptions("float32"), tmp_path / "b")
    expected, session = simulated(checkpoint, recipe), CachedSession(tmp_path / "b")
    for chunks in ((), (9, 1, 14)):
        actual = session.run(tokens(), chunks)
        errors = np.abs(actual - expected).max(axis=-1) / np.abs(expected).max()
        assert np.median(errors) < PARITY
        assert errors.max() < FLIP
    # Must differ: the same graph is not the model with every linear left alone.
    plain = Decoder(checkpoint).run(tokens(), recipe.prefix_ids)
    unquantized_logits = Decoder(checkpoint).head().logits(plain.get(0)).numpy()
    assert np.median(np.abs(unquantized_logits - expected).max(axis=-1)) > 10 * PARITY * np.abs(expected).max()


@pytest.mark.parametrize("name", MIXTURES)
def test_only_the_kept_expert_is_left_alone(tmp_path: Path, name: str) -> None:
    checkpoint = mixture(name).checkpoint
    recipe = recipe_of(name, SCHEMES["kept-expert"], checkpoint)
    export_bundle(checkpoint, recipe, ExportOptions("float32"), tmp_path / "b")
    graph = load_graph(tmp_path / "b" / "model.onnx").graph
    stored = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for module in linears(checkpoint.config):
        alone = is_router(module) or f"{block(name, 1)}.experts.2." in module
        assert stored[f"{module}.weight"] == (onnx.TensorProto.FLOAT if alone else onnx.TensorProto.INT8)
    shares = load_manifest(tmp_path / "b").linears
    assert shares["float32"].modules == 2 + 3
    # Of the weights' products a token needs k of E experts' only.
    shapes, config = tensor_shapes(checkpoint.config), checkpoint.config
    sizes = {module: float(np.prod(shapes[f"{module}.weight"])) for module in linears(config)}
    for module in sizes:
        if ".experts." in module:
            sizes[module] *= config.experts_per_token / config.num_experts
    alone_size = sum(size for module, size in sizes.items() if recipe.modules[module].precision != "int8")
    assert shares["float32"].mac_share == pytest.approx(alone_size / sum(sizes.values()), rel=1e-12)
    assert sum(share.mac_share for share in shares.values()) == pytest.approx(1)


PICKED, EXPERTS, UNPICKED = 2, 5, 4


def never_picked(name: str, factor: float) -> Checkpoint:
    """Return a mixture whose last expert is never picked, and whose outputs there are multiplied by `factor`.

    Of r, -r, s, -s two logits are positive, and the last expert's is always zero.
    """
    changes = {"num_local_experts" if name == "mixtral" else "num_experts": EXPERTS, "num_experts_per_tok": PICKED}
    checkpoint = mixture(name, **changes).checkpoint
    edits = {}
    for layer in range(2):
        router = f"{block(name, layer)}.gate.weight"
        rows = checkpoint.tensor(router)
        edits[router] = np.stack([rows[0], -rows[0], rows[1], -rows[1], np.zeros_like(rows[0])])
        for linear in ("gate", "up", "down"):
            weight = f"{expert(name, layer, UNPICKED, linear)}.weight"
            edits[weight] = checkpoint.tensor(weight) * np.float32(factor)
    return replaced(checkpoint, edits)


def exported_logits(checkpoint: Checkpoint, folder: Path) -> NDArray[Any]:
    export_bundle(checkpoint, None, ExportOptions("float32"), folder)
    return CachedSession(folder).run(tokens())


def save_flat(model: onnx.ModelProto, folder: Path) -> None:
    folder.mkdir()
    onnx.save(model, folder / "model.onnx")


OVERFLOWING = 1e14
"""Of three linears: 1e42, beyond float32, in which ONNX Runtime on a CPU computes float16 graphs too."""


@pytest.mark.parametrize("name", MIXTURES)
def test_an_expert_that_overflows_unpicked_leaves_no_trace(tmp_path: Path, name: str) -> None:
    expected = exported_logits(never_picked(name, 0.0), tmp_path / "tame")
    actual = exported_logits(never_picked(name, OVERFLOWING), tmp_path / "wild")
    assert np.isfinite(actual).all()
    np.testing.assert_array_equal(actual, expected)
    # Must fail: without the guard its infinity times its share of zero spoils everything.
    model = onnx.load(tmp_path / "wild" / "model.onnx")
    inline_branches(model)
    save_flat(model, tmp_path / "flat")
    np.testing.assert_array_equal(CachedSession(tmp_path / "flat").run(tokens()), expected)
    for node in model.graph.node:
        if node.op_type == "Where" and ".experts." in node.name:
            node.CopyFrom(onnx.helper.make_node("Identity", [node.input[1]], list(node.output), node.name))
    save_flat(model, tmp_path / "bare")
    assert np.isnan(CachedSession(tmp_path / "bare").run(tokens())).any()


def shares_of(bundle: Path, ids: NDArray[np.int64]) -> list[NDArray[np.float32]]:
    """Return every layer's shares [batch, sequence, experts]."""
    model = onnx.load(bundle / "model.onnx")
    names = [node.output[0] for node in model.graph.node if node.op_type == "ScatterElements"]
    for name in names:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for past in session.get_inputs()[2:]:
        feeds[past.name] = np.zeros((len(ids), past.shape[1], 0, past.shape[3]), np.float32)
    shares: list[NDArray[np.float32]] = session.run(names, feeds)
    return shares


@pytest.mark.parametrize("renormalized", [True, False])
def test_a_tie_picks_no_more_experts_than_the_model_does(tmp_path: Path, renormalized: bool) -> None:
    """All logits are equal, and so are the experts, so that whichever are picked the result is the same."""
    model = mixture("qwen3_moe", norm_topk_prob=renormalized)
    with torch.no_grad():
        for layer in model.reference.model.layers:
            layer.mlp.gate.weight.zero_()
            for stacked in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                stacked.copy_(stacked[:1].expand_as(stacked).clone())
    checkpoint = checkpoint_of(model.reference)
    export_bundle(checkpoint, None, ExportOptions("float32"), tmp_path / "b")
    assert_close(CachedSession(tmp_path / "b").run(tokens(2, 19)), reference_logits(model, tokens(2, 19)))
    for shares in shares_of(tmp_path / "b", tokens(2, 19)):
        np.testing.assert_array_equal((shares > 0).sum(axis=-1), 3)
        np.testing.assert_allclose(shares.sum(axis=-1), 1.0 if renormalized else 0.5, rtol=1e-6)


@pytest.mark.parametrize("name", MIXTURES)
def test_shares_are_transformers_own(tmp_path: Path, name: str) -> None:
    model, ids = mixture(name), tokens(2, 19)
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer in model.reference.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, __, output: found.append((output[1], output[2])))
    model.reference(torch.from_numpy(ids))
    export_bundle(model.checkpoint, None, ExportOptions("float32"), tmp_path / "b")
    for shares, (weights, indices) in zip(shares_of(tmp_path / "b", ids), found, strict=True):
        expected = np.zeros((38, shares.shape[-1]), np.float32)
        np.put_along_axis(expected, indices.numpy(), weights.numpy(), axis=1)
        np.testing.assert_allclose(shares.reshape(38, -1), expected, atol=PARITY)


@pytest.mark.parametrize("name", MIXTURES)
def test_the_router_is_a_float32_island_in_a_16_bit_graph(tmp_path: Path, name: str) -> None:
    checkpoint = mixture(name).checkpoint
    export_bundle(checkpoint, None, ExportOptions("float16"), tmp_path / "b")
    model = onnx.shape_inference.infer_shapes(load_graph(tmp_path / "b" / "model.onnx"))
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    types |= {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    kinds = ("Softmax", "TopK", "ReduceSum", "Div", "ScatterElements", "Where")
    nodes = [node for node in model.graph.node if node.op_type in kinds or node.name.endswith((".gate.MatMul", ".sum"))]
    seen = Counter(node.op_type for node in nodes)
    assert seen["MatMul"] == seen["Softmax"] == seen["TopK"] == seen["ScatterElements"] == 2
    assert seen["Where"] >= 2 * checkpoint.config.num_experts
    assert seen["Div"] == (2 if name == "mixtral" else 0)
    for node in nodes:
        assert types[node.output[0]] == onnx.TensorProto.FLOAT, node.name
    assert types[f"{expert(name, 0, 0, 'down')}.weight"] == onnx.TensorProto.FLOAT16
    # The experts share one cast of their input, made in front of the first branch.
    whole = onnx.load(tmp_path / "b" / "model.onnx", load_external_data=False).graph
    casts = [node.name for node in whole.node if node.op_type == "Cast"]
    assert casts.count("model.layers.1.post_attention_layernorm.RMSNormalization_to_float16") == 1
    actual = CachedSession(tmp_path / "b").run(tokens())
    expected = reference_logits(mixture(name), tokens())
    # 11 bits of mantissa: 5e-4 per rounding, a few dozen roundings on the way; the median, because a token whose
    # router is undecided may go to another expert.
    assert np.median(np.abs(actual - expected)) < 5e-3 * np.sqrt(np.mean(expected**2))


@pytest.mark.parametrize("name", MIXTURES)
def test_names_are_transformers_and_no_shape_depends_on_data(tmp_path: Path, name: str) -> None:
    checkpoint = mixture(name).checkpoint
    export_bundle(checkpoint, None, ExportOptions("float32"), tmp_path / "b")
    graph = load_graph(tmp_path / "b" / "model.onnx").graph
    assert set(tensor_shapes(checkpoint.config)) <= {tensor.name for tensor in graph.initializer}
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    assert {f"{module}.MatMul" for module in linears(checkpoint.config)} <= set(names)
    assert not {"NonZero", "If", "Loop", "Scan", "Compress", "Unique"} & {node.op_type for node in graph.node}
    settings = json.loads((tmp_path / "b" / "config.json").read_text())
    assert settings["architectures"] == [{"mixtral": "Mixtral", "qwen3_moe": "Qwen3Moe"}[name] + "ForCausalLM"]


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("name", MIXTURES)
def test_a_recipe_that_quantizes_a_router_is_refused(tmp_path: Path, name: str, precision: NumberFormat) -> None:
    checkpoint = mixture(name).checkpoint
    recipe = recipe_of(name, Case(), checkpoint)
    router = f"{block(name, 1)}.gate"
    quantized = {**recipe.modules, router: ModulePlan(precision=precision, activation_scale=0.1)}
    recipe = recipe.model_copy(update={"modules": quantized})
    with pytest.raises(RecipeError, match=rf"^the recipe quantizes {router}, .*set its precision to float32$"):
        export_bundle(checkpoint, recipe, ExportOptions(), tmp_path / "b")
    assert not list(tmp_path.iterdir())


def nodes_run(bundle: Path, folder: Path, sequence: int) -> Counter[str]:
    """Return how often each product of an expert's linear was computed in a call with `sequence` tokens."""
    options = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(folder / f"profile{sequence}")
    session = ort.InferenceSession(str(bundle / "model.onnx"), options, providers=["CPUExecutionProvider"])
    ids = tokens(1, sequence)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for past in session.get_inputs()[2:]:
        feeds[past.name] = np.zeros((1, past.shape[1], 0, past.shape[3]), np.float32)
    session.run(None, feeds)
    events = json.loads(Path(session.end_profiling()).read_text())
    kinds = [event["args"].get("op_name") for event in events if event.get("cat") == "Node"]
    return Counter(kind for kind in kinds if kind)


@pytest.mark.parametrize("name", MIXTURES)
def test_onnx_runtime_fuses_every_expert_and_computes_those_in_use(tmp_path: Path, name: str) -> None:
    checkpoint = mixture(name).checkpoint
    config = checkpoint.config
    export_bundle(checkpoint, recipe_of(name, Case(), checkpoint), ExportOptions("float32"), tmp_path / "b")
    attention = 4
    for sequence, used in ((1, config.experts_per_token), (24, config.num_experts)):
        run = nodes_run(tmp_path / "b", tmp_path, sequence)
        assert run["MatMulIntegerToFloat"] == 2 * (attention + 3 * used)
        assert run["MatMul"] == 2 + 1  # the routers, the head


@pytest.mark.parametrize("case", ["static", "token", "w8a16-expert"])
@pytest.mark.parametrize("name", MIXTURES)
def test_a_graph_without_its_branches_computes_the_same(tmp_path: Path, name: str, case: str) -> None:
    checkpoint = mixture(name).checkpoint
    export_bundle(checkpoint, recipe_of(name, SCHEMES[case], checkpoint), ExportOptions("float32"), tmp_path / "b")
    model = onnx.load(tmp_path / "b" / "model.onnx")
    assert sum(node.op_type == "If" for node in model.graph.node) == 2 * checkpoint.config.num_experts
    inline_branches(model)
    save_flat(model, tmp_path / "flat")
    onnx.checker.check_model(model, full_check=True)
    branching, flat = (CachedSession(tmp_path / name) for name in ("b", "flat"))
    for chunks in ((), (1,) * 24):
        np.testing.assert_array_equal(flat.run(tokens(1), chunks), branching.run(tokens(1), chunks))


@pytest.mark.parametrize("name", MIXTURES)
def test_exports_are_reproducible_and_aligned_in_the_branches_too(tmp_path: Path, name: str) -> None:
    checkpoint = mixture(name).checkpoint
    recipe = recipe_of(name, SCHEMES["kept-expert"], checkpoint)
    for folder in ("one", "two"):
        export_bundle(checkpoint, recipe, ExportOptions("float32"), tmp_path / folder)
    first, second = ({file.name: file.read_bytes() for file in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert first == second
    model = load_graph(tmp_path / "one" / "model.onnx")
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for module in linears(checkpoint.config):
        external = {entry.key: entry.value for entry in stored[f"{module}.weight"].external_data}
        assert int(external["offset"]) % 4096 == 0


@pytest.mark.parametrize("name", MIXTURES)
def test_files_that_transformers_writes_are_read(tmp_path: Path, name: str) -> None:
    model = mixture(name)
    model.reference.save_pretrained(tmp_path / "model")
    opened = open_checkpoint(str(tmp_path / "model"))
    assert replace(opened.config, hf=model.checkpoint.config.hf) == model.checkpoint.config
    for tensor in tensor_shapes(opened.config):
        np.testing.assert_array_equal(opened.tensor(tensor), model.checkpoint.tensor(tensor))
