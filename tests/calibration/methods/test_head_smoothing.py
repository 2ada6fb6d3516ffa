"""The smoothed head: equal to integer arithmetic written out, closer to the model, and chosen on unseen windows."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from spike_export.artifacts.errors import RecipeError
from spike_export.artifacts.recipe import Dtype, HeadScheme, Recipe, RotationPlan, Scheme, load_recipe, save_recipe
from spike_export.calibration.corpus.corpus import Corpus
from spike_export.calibration.corpus.token_windows import TokenWindows
from spike_export.calibration.decoder.equivalent.equivalent_weights import equivalent_checkpoint
from spike_export.calibration.decoder.equivalent.rotation import rotation_plan
from spike_export.calibration.decoder.equivalent.smoothing import plan_scales, smoothing_plan
from spike_export.calibration.decoder.layerwise import FINAL_NORM, Decoder, Execution
from spike_export.calibration.decoder.perplexity import model_perplexity
from spike_export.calibration.decoder.simulate import QuantizedWeights, Simulation
from spike_export.calibration.methods.context import NO_TRANSFORM, Calibration
from spike_export.calibration.methods.head_smoothing import CANDIDATES
from spike_export.calibration.methods.module_choice import NOTHING_KEPT
from spike_export.calibration.methods.options import CalibrationOptions
from spike_export.calibration.recipe_writer import build_recipe
from spike_export.checkpoint.checkpoint import LM_HEAD
from spike_export.engines.accuracy.variants import Variant, check_variants
from spike_export.engines.onnx_runtime.session import open_bundle
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.cache_options import CacheOptions
from tests.support.tiny.families import replaced, tiny_family
from tests.support.tiny.models import CachedSession, TinyModel, input_scales, tiny_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

DYNAMIC: HeadScheme = "int8-per-token-dynamic"
VOCABULARY, HIDDEN = 99, 48
OUTLIER = 7
"""Channel of the final norm whose gain is planted."""

FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen3": {},  # a head of its own
    "gemma": {},  # norms with 1 + w, tied
    "gemma2": {},  # a soft cap of the logits too
    "granite": {},  # logits are divided
}


def tokens(batch: int = 2, length: int = 19, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(3, VOCABULARY, (batch, length))


def planted(name: str = "llama", outlier: float = 40.0, **changes: Any) -> TinyModel:
    """Return a model with one channel of the final norm's output that is far larger than the rest."""
    model = tiny_family(name, **{**FAMILIES.get(name, {}), **changes})
    gain = model.checkpoint.tensor(FINAL_NORM).copy()
    gain[OUTLIER] = outlier
    with torch.no_grad():
        model.reference.model.norm.weight.copy_(torch.from_numpy(gain))
    return replace(model, checkpoint=replaced(model.checkpoint, {FINAL_NORM: gain}))


def calibration_of(model: TinyModel, windows: NDArray[np.int64] | None = None, **options: Any) -> Calibration:
    content = tokens(8, 24, seed=3) if windows is None else windows
    settings = CalibrationOptions(samples=len(content), length=content.shape[1] + 1, dtype="float32")
    placed = TokenWindows(content, tokens(6, 24, seed=4))
    return Calibration(model.checkpoint, placed, replace(settings, head=DYNAMIC, **options))


def recipe_of(model: TinyModel, *, kept: bool = True, smoothed: bool = True, prefix: tuple[int, ...] = ()) -> Recipe:
    """Return a recipe with the head's smoothing that calibration chooses, its linears kept or in INT8."""
    scales = input_scales(model, tokens(4, 40))
    plans: dict[str, Dtype] = dict.fromkeys(scales, "float32") if kept else {}
    scheme = Scheme(head=DYNAMIC, unquantized="float32")
    recipe = tiny_recipe(model.checkpoint, scales, kept=plans, prefix=prefix, scheme=scheme)
    plan = calibration_of(model).head_smoothing(None).plan
    assert plan is not None
    return recipe.model_copy(update={"head_smoothing": plan}) if smoothed else recipe


def integer_logits(model: TinyModel, ids: NDArray[np.int64], scales: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the logits of transformers' final states written out: whole numbers are multiplied, the steps behind."""
    states = model.reference.model(torch.from_numpy(ids)).last_hidden_state.numpy() / scales
    weight = model.checkpoint.tensor(LM_HEAD) * scales
    step = (np.abs(weight).max(axis=1) / np.float32(127)).astype(np.float32)
    token_step = (np.abs(states).max(axis=-1, keepdims=True) / np.float32(127)).astype(np.float32)
    whole = np.rint(states / token_step).astype(np.float64) @ np.rint(weight / step[:, None]).astype(np.float64).T
    return behind_the_head(model, whole * step * token_step)


def behind_the_head(model: TinyModel, logits: NDArray[np.float64]) -> NDArray[np.float64]:
    config = model.reference.config
    logits = logits / getattr(config, "logits_scaling", 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * np.tanh(logits / cap)


def one_flip(model: TinyModel, ids: NDArray[np.int64], scales: NDArray[np.float32]) -> float:
    """Return what a logit moves by where two channels of a token are rounded the other way: a step each."""
    states = model.reference.model(torch.from_numpy(ids)).last_hidden_state.numpy() / scales
    weight = np.abs(model.checkpoint.tensor(LM_HEAD) * scales).max()
    scaling = getattr(model.reference.config, "logits_scaling", 1.0)
    return float(2 * np.abs(states).max() / 127 * weight / scaling)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_graphs_head_is_integer_arithmetic_and_closer_to_the_model(tmp_path: Path, name: str) -> None:
    model, ids = planted(name), tokens()
    recipe = recipe_of(model)
    assert recipe.head_smoothing is not None
    scales = plan_scales(recipe.head_smoothing)
    assert scales.argmax() == OUTLIER
    exact = model.reference(torch.from_numpy(ids)).logits.numpy()
    errors = {}
    for smoothed, divisors in ((True, scales), (False, np.ones_like(scales))):
        folder = tmp_path / str(smoothed)
        export_bundle(model.checkpoint, recipe_of(model, smoothed=smoothed), ExportOptions("float32"), folder)
        actual, expected = CachedSession(folder).run(ids), integer_logits(model, ids, divisors)
        assert np.abs(actual - expected).max() <= one_flip(model, ids, divisors)
        # Two flips are rare: nearly all logits are those of the same whole numbers.
        assert np.median(np.abs(actual - expected)) <= 1e-5 * np.abs(expected).max()
        errors[smoothed] = float(np.sqrt(np.mean((actual - exact) ** 2)))
    assert errors[True] < 0.7 * errors[False]


@pytest.mark.parametrize("name", ["llama", "gemma"])
@pytest.mark.parametrize("resident", [True, False])
def test_the_simulated_head_is_the_same_arithmetic(name: str, resident: bool) -> None:
    model, ids = planted(name), tokens()
    plan = recipe_of(model).head_smoothing
    assert plan is not None
    decoder = Decoder(model.checkpoint, Execution(resident=resident))
    states = decoder.run(ids).get(0)
    expected = {None: integer_logits(model, ids, np.ones(HIDDEN, np.float32))}
    expected[plan] = integer_logits(model, ids, plan_scales(plan))
    assert np.abs(expected[None] - expected[plan]).max() > 1e-2
    # In turns: a weight that is kept must not be taken for that of another smoothing.
    for used in (plan, None, plan):
        actual = decoder.head(DYNAMIC, used).logits(states).numpy()
        assert np.median(np.abs(actual - expected[used])) <= 1e-5 * np.abs(actual).max()
    for scheme in ("unquantized", "int8-weights"):
        plain, given = (decoder.head(scheme, each).logits(states) for each in (None, plan))  # type: ignore[arg-type]
        assert torch.equal(plain, given)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.norm.gain"])
def test_a_gain_that_is_not_divided_is_noticed(tmp_path: Path, name: str) -> None:
    model, ids = planted("llama" if name.endswith("weight") else "gemma"), tokens()
    recipe = recipe_of(model)
    assert recipe.head_smoothing is not None
    scales = plan_scales(recipe.head_smoothing)
    export_bundle(model.checkpoint, recipe, ExportOptions("float32"), tmp_path)
    graph = onnx.load(tmp_path / "model.onnx")
    # Not the checkpoint's tensor any more, and so not under its name.
    tensor = next(each for each in graph.graph.initializer if each.name == "model.norm.gain")
    whole = onnx.numpy_helper.to_array(tensor) * scales
    offset = 1.0 if name.endswith("gain") else 0.0
    assert whole == pytest.approx(model.checkpoint.tensor(FINAL_NORM) + offset, rel=1e-6)
    tensor.CopyFrom(onnx.numpy_helper.from_array(whole.astype(np.float32), tensor.name))
    onnx.save(graph, tmp_path / "model.onnx")
    wrong = np.abs(CachedSession(tmp_path).run(ids) - integer_logits(model, ids, scales)).max()
    assert wrong > one_flip(model, ids, scales)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_last_token_and_static_cache_give_the_same_logits(tmp_path: Path, dtype: Dtype) -> None:
    model, ids = planted(), tokens(2, 12)
    recipe = recipe_of(model, kept=False, prefix=(5, 1, 9))
    static = CacheOptions("static", 24)
    for name, options in (
        ("all", ExportOptions(dtype)),
        ("last", ExportOptions(dtype, logits="last")),
        ("static", ExportOptions(dtype, cache=static)),
    ):
        export_bundle(model.checkpoint, recipe, options, tmp_path / name)
    every = open_bundle(tmp_path / "all").prefill(ids)
    scale = np.abs(every).max()
    # The same rows of the same products; a flip of float16's last bit moves a rounded channel by one step of 127.
    allowed = 1e-5 if dtype == "float32" else 0.05
    assert np.abs(open_bundle(tmp_path / "last").prefill(ids)[:, 0] - every[:, -1]).max() <= allowed * scale
    assert np.abs(open_bundle(tmp_path / "static").prefill(ids) - every).max() <= allowed * scale


def test_the_prediction_is_what_onnx_runtime_shows_behind_int8_linears(tmp_path: Path) -> None:
    # A smaller outlier: random tokens are so unlikely under a larger one that the last bits of the logits count.
    model, content = planted(outlier=6.0), tokens(6, 40, seed=8)
    recipe = recipe_of(model, kept=False, prefix=(5, 1, 0))
    assert model.checkpoint.bos_token_id in recipe.prefix_ids
    decoder = Decoder(model.checkpoint)
    visits = (Simulation(recipe.modules, QuantizedWeights(recipe.scheme.weights)).visit,)
    shown = {}
    for name, each in (("smoothed", recipe), ("plain", recipe.model_copy(update={"head_smoothing": None}))):
        variants = [Variant(name, each)]
        options = ExportOptions("float32")
        corpus = Corpus("none", ("x",))
        check = check_variants(model.checkpoint, lambda: decoder, corpus, content, variants, options)
        plan, prefix = each.head_smoothing, each.prefix_ids
        predicted = model_perplexity(decoder, content, 40, prefix, visits, head=DYNAMIC, head_smoothing=plan)
        # Flips of rounding in two layers, of 240 tokens: measured 6e-4.
        assert check.variants[0].perplexity == pytest.approx(predicted, rel=2e-3)
        shown[name] = check.variants[0].perplexity
    assert shown["smoothed"] != pytest.approx(shown["plain"], rel=2e-3)


def test_the_best_candidate_is_chosen_and_all_are_recorded() -> None:
    model = planted()
    calibration = calibration_of(model)
    chosen = calibration.head_smoothing(None)
    assert chosen.plan is not None
    names = {f"{form} {parameter}" for form, parameter in CANDIDATES}
    assert {each.name for each in chosen.candidates} == {"none", *names}
    divergences = [each.divergence for each in chosen.candidates]
    assert divergences == sorted(divergences)
    assert chosen.candidates[0].name == f"{chosen.plan.form} {chosen.plan.parameter}"
    assert [each.verdict for each in chosen.candidates].index("chosen") == 0
    plain = next(each.divergence for each in chosen.candidates if each.name == "none")
    assert divergences[0] < plain / 2
    recipe = build_recipe(calibration, Corpus("none", ("x",)), calibration.measure(()), NOTHING_KEPT)
    assert recipe.head_smoothing == chosen.plan
    assert recipe.search.head == chosen.candidates
    # The prediction knows of it.
    statistics = calibration.measure(())
    without = replace(calibration.options, smoothing=False)
    smoothed = calibration.predicted(statistics, (), NO_TRANSFORM).divergence
    assert smoothed < calibration.with_options(without).predicted(statistics, (), NO_TRANSFORM).divergence


@pytest.mark.parametrize(("head", "smoothing"), [("unquantized", True), ("int8-weights", True), (DYNAMIC, False)])
def test_other_heads_and_no_smoothing_have_none(head: HeadScheme, smoothing: bool) -> None:
    calibration = calibration_of(planted(), smoothing=smoothing)
    calibration = calibration.with_options(replace(calibration.options, head=head))
    chosen = calibration.head_smoothing(None)
    assert (chosen.plan, chosen.candidates) == (None, ())


def test_the_scales_come_from_windows_that_do_not_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spike_export.calibration.methods.head_smoothing.CANDIDATES", (("smoothquant", 0.5),))
    model, content = planted(outlier=12.0), tokens(8, 24, seed=3)
    calibration = calibration_of(model, content)
    changed = content.copy()
    changed[calibration.search_rows] = tokens(len(calibration.search_rows), 24, seed=11)
    others = content.copy()
    others[np.setdiff1d(np.arange(8), calibration.search_rows)] = tokens(6, 24, seed=12)

    def scored(windows: NDArray[np.int64]) -> dict[str, float]:
        return {each.name: each.divergence for each in calibration_of(model, windows).head_smoothing(None).candidates}

    def exponents(windows: NDArray[np.int64]) -> str:
        plan = calibration_of(model, windows).head_smoothing(None).plan
        assert plan is not None
        return f"{plan.form} {plan.parameter} {plan.exponents}"

    # Other windows judge differently, and leave the scales as they are; without smoothing there are none to change.
    assert exponents(changed) == exponents(content)
    assert scored(changed)["none"] != scored(content)["none"]
    assert scored(others)["none"] == scored(content)["none"]
    assert exponents(others) != exponents(content)


@pytest.mark.parametrize("tie", [True, False])
def test_the_head_of_a_rotated_model_is_smoothed_too(tmp_path: Path, tie: bool) -> None:
    model, ids = planted(tie_word_embeddings=tie), tokens()
    rotation: RotationPlan = rotation_plan(HIDDEN, 0)
    calibration = calibration_of(model, rotation="always")
    chosen = calibration.head_smoothing(rotation)
    # The rotation has spread the outlier: what is left to gain is little, and another smoothing than the plain model's.
    assert chosen != calibration.head_smoothing(None)
    plan = smoothing_plan("smoothquant", 0.5, np.linspace(0.25, 4, HIDDEN, dtype=np.float32))
    recipe = recipe_of(model, smoothed=False)
    recipe = recipe.model_copy(update={"rotation": rotation, "head_smoothing": plan})
    export_bundle(model.checkpoint, recipe, ExportOptions("float32"), tmp_path / "bundle")
    rotated = Decoder(equivalent_checkpoint(model.checkpoint, rotation, {}))
    simulated = rotated.head(DYNAMIC, plan).logits(rotated.run(ids).get(0)).numpy()
    actual = CachedSession(tmp_path / "bundle").run(ids)
    scale = np.abs(simulated).max()
    assert np.median(np.abs(actual - simulated)) <= 1e-5 * scale
    exact = model.reference(torch.from_numpy(ids)).logits.numpy()
    assert np.abs(actual - exact).max() <= 0.1 * np.abs(exact).max()


def test_a_recipe_without_the_key_loads_and_one_with_it_round_trips(tmp_path: Path) -> None:
    recipe = recipe_of(planted())
    path = tmp_path / "recipe.json"
    save_recipe(recipe, path)
    assert load_recipe(path) == recipe
    older = recipe.model_copy(update={"head_smoothing": None})
    save_recipe(older, path)
    lines = [line for line in path.read_text().splitlines() if "head_smoothing" not in line]
    path.write_text("\n".join(lines))
    assert load_recipe(path) == older


@pytest.mark.parametrize("head", [DYNAMIC, "int8-weights"])
@pytest.mark.parametrize(
    ("exponents", "words"), [("AAAA", "3 scales for 48 channels"), ("?", "head_smoothing"), ("AAA", "padding")]
)
def test_a_smoothing_of_another_model_is_refused(tmp_path: Path, head: HeadScheme, exponents: str, words: str) -> None:
    model = planted()
    recipe = recipe_of(model)
    assert recipe.head_smoothing is not None
    wrong = recipe.model_copy(
        update={
            "head_smoothing": recipe.head_smoothing.model_copy(update={"exponents": exponents}),
            "scheme": recipe.scheme.model_copy(update={"head": head}),
        }
    )
    with pytest.raises(RecipeError, match=words) as caught:
        export_bundle(model.checkpoint, wrong, ExportOptions("float32"), tmp_path / "never")
    assert "remove it, or calibrate again" in str(caught.value)
    assert not list(tmp_path.iterdir())
