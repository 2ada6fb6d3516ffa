"""Perplexity, agreement and divergence against independent formulas, and the variants of a check."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from spike_export.artifacts.errors import ArtifactError, EngineError
from spike_export.artifacts.files import free_space
from spike_export.artifacts.recipe import ActivationRange
from spike_export.artifacts.results.check_document import Check
from spike_export.calibration.ablation import ablations
from spike_export.calibration.corpus.corpus import Corpus
from spike_export.calibration.corpus.token_windows import TokenWindows
from spike_export.calibration.decoder.layerwise import Decoder
from spike_export.calibration.methods.context import Calibration, Transform
from spike_export.calibration.methods.module_choice import NOTHING_KEPT
from spike_export.calibration.methods.options import CalibrationOptions
from spike_export.calibration.methods.qfem import Scores
from spike_export.calibration.methods.smoothing_search import default_smoothing
from spike_export.calibration.recipe_writer import build_recipe
from spike_export.calibration.statistics.spikes import SpikeStatistics
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.checkpoint.modules import linears
from spike_export.engines.accuracy.comparison import compare, references
from spike_export.engines.accuracy.cost import _ranges
from spike_export.engines.accuracy.distances import Accuracy, distances, likelihood
from spike_export.engines.accuracy.predictions import Predictions, log_softmax, predictions, record_type
from spike_export.engines.accuracy.variants import Text, Variant, check_variants
from spike_export.engines.onnx_runtime.session import open_bundle
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.pipeline.job import Job
from spike_export.pipeline.pipeline import Pipeline
from spike_export.pipeline.run_directory import RunDirectory
from spike_export.report.check_table import check_rows
from tests.support.tiny.models import TinyModel, input_scales, model_with_bos, tiny_llama, tiny_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

BOS = 1
CORPUS = Corpus("test", ("text",))


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return model_with_bos(tiny_llama(), BOS)


@pytest.fixture(scope="module")
def content() -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(3, 99, (3, 70))  # more positions than are compared at once


def random_logits(seed: int, rows: int = 150, scale: float = 3.0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal((rows, 37)) * scale).astype(np.float32)


def torch_log_softmax(logits: NDArray[np.float32]) -> torch.Tensor:
    return torch.log_softmax(torch.from_numpy(logits).double(), dim=-1)


EXTREMES = np.array(
    [
        [0.0, 0.0, 0.0],
        [1e4, -1e4, 0.0],  # exp() of the difference underflows
        [65504.0, 65504.0, -65504.0],  # the ends of float16
        [3e38, -3e38, 0.0],  # of float32: the difference overflows float32
        [-3e38, -3e38, -3e38],
    ],
    dtype=np.float32,
)


@pytest.mark.parametrize("logits", [random_logits(0), EXTREMES, random_logits(1).astype(np.float16)])
def test_log_softmax(logits: Any) -> None:
    ours = log_softmax(logits)
    assert ours.dtype == np.float64
    np.testing.assert_allclose(ours, torch_log_softmax(logits).numpy(), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(np.exp(ours).sum(-1), 1, rtol=1e-12)


def test_log_softmax_leaves_its_input_alone() -> None:
    logits = random_logits(0).astype(np.float64)
    before = logits.copy()
    log_softmax(logits)  # type: ignore[arg-type]
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 150])
def test_likelihood_is_the_cross_entropy(rows: int) -> None:
    logits, targets = random_logits(2, rows), np.random.default_rng(3).integers(0, 37, rows)
    ours = likelihood(logits, targets)
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits).double(), torch.from_numpy(targets), reduction="sum"
    )
    assert ours.tokens == rows
    assert np.log(ours.perplexity) * rows == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("rows", [1, 64, 65, 150])
def test_distances_are_those_of_their_formulas(rows: int) -> None:
    reference, other = random_logits(4, rows), random_logits(5, rows)
    targets = np.random.default_rng(6).integers(0, 37, rows)
    expected, actual = torch_log_softmax(reference), torch_log_softmax(other)
    found = distances(predictions(reference, targets), other, targets)
    divergence = torch.nn.functional.kl_div(actual, expected, log_target=True, reduction="none").sum(-1)
    np.testing.assert_allclose(found.divergence, divergence.numpy(), rtol=1e-12)
    for ours, theirs in ((found.negative, actual), (found.reference_negative, expected)):
        loss = torch.nn.functional.nll_loss(theirs, torch.from_numpy(targets), reduction="none")
        np.testing.assert_allclose(ours, loss.numpy(), rtol=1e-12)
    best = expected.argmax(-1)
    np.testing.assert_array_equal(found.same_best, (actual.argmax(-1) == best).numpy())
    among = (actual.topk(5).indices == best[:, None]).any(-1)
    np.testing.assert_array_equal(found.best_among_first, among.numpy())


def test_a_distribution_is_at_no_distance_from_itself() -> None:
    logits, targets = random_logits(6), np.zeros(150, np.int64)
    same = distances(predictions(logits, targets), logits, targets)
    assert not same.divergence.any()
    assert same.same_best.all()
    assert same.best_among_first.all()
    # A constant added to all logits is the same distribution; float32 sums of this size round at 1e-6.
    moved = distances(predictions(logits, targets), logits + np.float32(8), targets)
    assert moved.divergence.sum() == pytest.approx(0, abs=1e-9)
    ends = EXTREMES[:3]
    assert not distances(predictions(ends, targets[:3]), ends, targets[:3]).divergence.any()


def transformers_logits(model: TinyModel, content: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits [windows, tokens - 1, vocab] of all positions that predict content, BOS fed first."""
    fed = np.concatenate([np.full((len(content), 1), BOS), content], axis=1)
    with torch.inference_mode():
        logits: NDArray[np.float32] = model.reference(torch.from_numpy(fed)).logits[:, 1:-1].numpy()
    return logits


@pytest.mark.parametrize("quantized", [False, True])
def test_compare_equals_a_direct_computation(
    model: TinyModel, content: NDArray[np.int64], tmp_path: Path, quantized: bool
) -> None:
    scales = input_scales(model, content)
    recipe = tiny_recipe(model.checkpoint, scales) if quantized else None
    export_bundle(model.checkpoint, recipe, ExportOptions("float32"), tmp_path / "bundle")
    session = open_bundle(tmp_path / "bundle")
    with references(lambda: Decoder(model.checkpoint), [(content, ())], BOS) as (reference,):
        result = compare(session, reference)
        perplexity = reference.perplexity
    expected = torch.from_numpy(transformers_logits(model, content)).double()
    actual = torch.from_numpy(session.prefill(content)[:, :-1]).double()
    targets = torch.from_numpy(content[:, 1:])

    def direct(logits: torch.Tensor) -> float:
        return float(torch.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())))

    divergence = (expected.softmax(-1) * (expected.log_softmax(-1) - actual.log_softmax(-1))).sum(-1).mean()
    # Reference logits of one float32 model computed in two ways differ in the last bits of float32.
    assert perplexity == pytest.approx(direct(expected), rel=1e-5)
    assert result.perplexity == pytest.approx(direct(actual), rel=1e-9)
    assert result.divergence.mean == pytest.approx(float(divergence), rel=1e-3, abs=1e-9)
    agreement = (expected.argmax(-1) == actual.argmax(-1)).double().mean()
    assert result.top1_agreement.mean == pytest.approx(float(agreement), abs=1e-12)
    if quantized:
        assert result.divergence.mean > 1e-4
        assert result.top1_agreement.mean < 1
    else:
        assert result.divergence.mean == pytest.approx(0, abs=1e-9)
        assert result.top1_agreement.mean == 1


class FixedSession:
    """Answers with given logits [windows, tokens, vocab], one window after the other."""

    def __init__(self, logits: NDArray[np.float32]) -> None:
        self.answers = iter(logits)

    def prefill(self, _: NDArray[np.int64]) -> NDArray[np.float32]:
        return next(self.answers)[None]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused_by_window(
    model: TinyModel, content: NDArray[np.int64], value: float
) -> None:
    logits = random_logits(7, 3 * 70).reshape(3, 70, 37)[..., :1].repeat(99, axis=2)
    logits[1, 5, 3] = value
    with (
        references(lambda: Decoder(model.checkpoint), [(content, ())], BOS) as (reference,),
        pytest.raises(EngineError, match="not finite in evaluation window 1"),
    ):
        compare(FixedSession(logits), reference)  # type: ignore[arg-type]


def test_agreement_counts_the_positions(model: TinyModel, content: NDArray[np.int64]) -> None:
    with references(lambda: Decoder(model.checkpoint), [(content, ())], BOS) as (reference,):
        logits = np.stack([np.pad(whole_logits(reference.window(index)), ((0, 1), (0, 0))) for index in range(3)])
        exact = compare(FixedSession(logits), reference)  # type: ignore[arg-type]
        logits[0, :10] *= -1  # the least likely token becomes the most likely one
        turned = compare(FixedSession(logits), reference)  # type: ignore[arg-type]
    assert (exact.top1_agreement.mean, exact.divergence.mean, exact.probability_error) == (1.0, 0.0, 0.0)
    assert (exact.increase.mean, exact.increase.margin) == (0.0, 0.0)
    assert turned.top1_agreement.mean == turned.top5_agreement.mean == pytest.approx(1 - 10 / (3 * 69))
    # All that differs lies in the turned positions: the worst are among them, and most positions diverge by nothing.
    assert {(window, position < 10) for window, position, _ in turned.worst(10)} == {(0, True)}
    assert turned.worst(1)[0][2] == turned.divergence_quantile(1.0) > turned.divergence_quantile(0.9) == 0


def whole_logits(rows: Predictions) -> NDArray[np.float32]:
    """Return the logits [positions, vocab] of predictions that kept all of the vocabulary."""
    logits = np.full((len(rows), rows["tokens"].shape[1]), np.nan, np.float32)
    np.put_along_axis(logits, rows["tokens"], rows["logits"], axis=1)
    return logits


def test_the_references_predictions_are_gone_afterwards(
    model: TinyModel, content: NDArray[np.int64], tmp_path: Path
) -> None:
    with references(lambda: Decoder(model.checkpoint), [(content, ())], None, scratch=tmp_path) as (reference,):
        assert reference.rows.shape == (3, 69)
        assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1
    assert not list(tmp_path.iterdir())


def test_too_little_room_for_the_references_predictions(
    model: TinyModel, content: NDArray[np.int64], monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 3 * 69 * record_type(99).itemsize
    for free, enough in ((needed, True), (needed - 1, False)):
        usage = type("Usage", (), {"free": free})
        monkeypatch.setattr(free_space.shutil, "disk_usage", lambda _, usage=usage: usage)
        context = references(lambda: Decoder(model.checkpoint), [(content, ())], BOS)
        if enough:
            with context:
                continue
        with pytest.raises(ArtifactError, match=f"predictions needs {needed:,} bytes and {free:,} are free; free"):
            context.__enter__()


def checked(model: TinyModel, content: NDArray[np.int64], variants: list[Variant], dtype: Any) -> Check:
    def load() -> Decoder:
        return Decoder(model.checkpoint)

    return check_variants(model.checkpoint, load, CORPUS, content[:, :12], variants, ExportOptions(dtype))


def test_a_variant_without_a_bundle_is_exported_for_the_check(model: TinyModel, content: NDArray[np.int64]) -> None:
    kept = {"model.layers.1.mlp.down_proj": "float32"}
    recipe = tiny_recipe(model.checkpoint, input_scales(model, content), kept=kept, prefix=(BOS, 5))
    told: list[tuple[int, int]] = []
    check = check_variants(
        model.checkpoint,
        lambda: Decoder(model.checkpoint),
        CORPUS,
        content[:, :12],
        [Variant("plain", None), Variant("all", recipe)],
        ExportOptions("float32"),
        lambda _, done, total: told.append((done, total)),
    )
    plain, both = check.variants
    assert (plain.int8_linears, plain.kept_linears, plain.prefix_length, plain.shipped) == (0, 14, 0, False)
    assert (both.int8_linears, both.kept_linears, both.prefix_length, both.shipped) == (13, 1, 2, False)
    assert (plain.activation_range, both.activation_range) == (None, "max")
    assert plain.increase == pytest.approx(plain.perplexity / check.reference.perplexity - 1)
    assert (check.corpus.windows, check.corpus.length, check.note) == (3, 12, None)
    # One count over reference and variants, which only grows and ends at its total.
    assert told == [(done, 9) for done in range(1, 10)]


def test_a_shipped_bundle_is_evaluated_as_it_is(model: TinyModel, content: NDArray[np.int64], tmp_path: Path) -> None:
    scales = input_scales(model, content)
    export_bundle(model.checkpoint, tiny_recipe(model.checkpoint, scales), ExportOptions("float32"), tmp_path / "b")
    # The recipe given beside it would say otherwise.
    check = checked(model, content, [Variant("shipped", None, tmp_path / "b")], "float32")
    assert check.shipped is not None
    assert check.shipped.int8_linears == 14


def test_the_reference_is_told_behind_the_shipped_prefix(
    model: TinyModel, content: NDArray[np.int64], tmp_path: Path
) -> None:
    prefix = (BOS, 5)
    recipe = tiny_recipe(model.checkpoint, input_scales(model, content), prefix=prefix)
    export_bundle(model.checkpoint, recipe, ExportOptions("float32"), tmp_path / "b")
    check = checked(model, content, [Variant("shipped", recipe, tmp_path / "b")], "float32")
    # The same as the prefix before the tokens in transformers' own model, of which the content is scored.
    fed = np.concatenate([np.tile(prefix, (len(content), 1)), content[:, :12]], axis=1)
    with torch.inference_mode():
        logits = model.reference(torch.from_numpy(fed)).logits[:, len(prefix) : -1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(content[:, 1:12]).flatten())
    assert check.reference.behind_prefix == pytest.approx(float(loss.exp()), rel=1e-4)
    assert check.reference.behind_prefix != pytest.approx(check.reference.perplexity, rel=1e-3)
    assert any("behind the prefix" in row[0] for row in check_rows(check))
    plain = checked(model, content, [Variant("shipped", None, tmp_path / "b")], "float32")
    assert plain.reference.behind_prefix == check.reference.behind_prefix  # from the manifest


def test_what_is_shipped_behind_a_prefix_is_compared_behind_it(
    model: TinyModel, content: NDArray[np.int64], tmp_path: Path
) -> None:
    # Nothing is quantized: the bundle differs from the reference without a prefix, and from none behind the prefix.
    kept = dict.fromkeys(linears(model.checkpoint.config), "float32")
    recipe = tiny_recipe(model.checkpoint, input_scales(model, content), kept=kept, prefix=(BOS, 5))
    export_bundle(model.checkpoint, recipe, ExportOptions("float32"), tmp_path / "b")
    check = checked(model, content, [Variant("plain", None), Variant("shipped", recipe, tmp_path / "b")], "float32")
    plain, shipped = check.variants
    assert plain.cost is not None
    assert shipped.cost is not None
    for cost in (plain.cost, shipped.cost):
        assert cost.increase.mean == pytest.approx(0, abs=1e-5)  # of two float32 computations
        assert cost.divergence.mean == pytest.approx(0, abs=1e-9)
    assert shipped.increase == pytest.approx(check.reference.behind_prefix / check.reference.perplexity - 1, abs=1e-5)  # type: ignore[operator]
    assert abs(shipped.increase or 0) > 1e-3


def test_a_further_text_is_judged_behind_the_shipped_prefix(
    model: TinyModel, content: NDArray[np.int64], tmp_path: Path
) -> None:
    recipe = tiny_recipe(model.checkpoint, input_scales(model, content), prefix=(BOS, 5))
    export_bundle(model.checkpoint, recipe, ExportOptions("float32"), tmp_path / "b")
    told: list[tuple[int, int]] = []
    shipped, other = content[:1, :12], content[1:, :20]
    check = check_variants(
        model.checkpoint,
        lambda: Decoder(model.checkpoint),
        CORPUS,
        shipped,
        [Variant("plain", None), Variant("shipped", recipe, tmp_path / "b")],
        ExportOptions("float32"),
        lambda _, done, total: told.append((done, total)),
        texts=[Text("other", "0f", other)],
    )
    # The same bundle on the same windows, once as a text of its own and once as the main one.
    alone = check_variants(
        model.checkpoint,
        lambda: Decoder(model.checkpoint),
        CORPUS,
        other,
        [Variant("shipped", recipe, tmp_path / "b")],
        ExportOptions("float32"),
    )
    (text,) = check.texts
    assert alone.shipped is not None
    assert (text.perplexity, text.cost) == (alone.shipped.perplexity, alone.shipped.cost)
    assert text.reference == alone.reference.behind_prefix
    assert (text.corpus.name, text.corpus.windows, text.corpus.length) == ("other", 2, 20)
    # 1 window plain, behind the prefix, of each variant, and of the noise floor; 2 of the text of the reference and of
    # the bundle.
    assert told == [(done, 9) for done in range(1, 10)]
    assert check.noise is not None
    assert check.noise.windows == 1


def test_a_bfloat16_bundle_is_checked_in_float32_with_a_note(
    model: TinyModel, content: NDArray[np.int64], tmp_path: Path
) -> None:
    kept = {"model.layers.0.mlp.up_proj": "bfloat16"}
    recipe = tiny_recipe(model.checkpoint, input_scales(model, content), kept=kept)
    export_bundle(model.checkpoint, recipe, ExportOptions("bfloat16"), tmp_path / "b")
    for dtype in ("bfloat16", "float16"):  # float16 with one linear in bfloat16: no kernel either
        check = checked(model, content, [Variant("x", recipe, tmp_path / "b")], dtype)
        assert check.dtype == "float32"
        assert check.note is not None
        assert "checked in float32" in check.note
        assert check.shipped is not None
        assert (check.shipped.int8_linears, check.shipped.kept_linears) == (13, 1)


@pytest.fixture(scope="module")
def calibration(model: TinyModel, content: NDArray[np.int64]) -> Calibration:
    windows = TokenWindows(content[:, :16], content[:, 16:32])
    return Calibration(model.checkpoint, windows, CalibrationOptions(samples=3, length=17))


@pytest.fixture(scope="module")
def statistics(calibration: Calibration) -> tuple[SpikeStatistics, SpikeStatistics]:
    return calibration.measure(()), calibration.measure((BOS, 7))


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize(("kept", "prefixed", "rule"), list(product((0, 2), (False, True), ("max", "sample-mean"))))
def test_the_variants_of_a_run_by_name_and_order(
    calibration: Calibration,
    statistics: tuple[SpikeStatistics, SpikeStatistics],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kept: int,
    prefixed: bool,
    rule: ActivationRange,
    smoothed: bool,
) -> None:
    plain, behind = statistics[0], statistics[1] if prefixed else statistics[0]
    work = replace(calibration, options=replace(calibration.options, activation_range=rule))
    choice = Scores.sorted("ratio", behind.ratios(), work.checkpoint.config).keep_highest(kept)
    transform = Transform(smoothing=default_smoothing(behind, work.checkpoint.config, ones, False) if smoothed else {})
    recipe = build_recipe(work, CORPUS, behind, choice, transform)
    methods = ["w8a8"] + ["w8a8+qfem"] * bool(kept) + ["w8a8+qfep"] * prefixed
    methods += ["w8a8+qfem+qfep"] * (bool(kept) and prefixed)
    recipes = ablations(work, CORPUS, plain, behind, recipe)
    assert list(recipes) == methods
    for name, each in recipes.items():
        assert bool(each.kept()) == ("qfem" in name)
        assert bool(each.prefix) == ("qfep" in name)
        assert each.scheme.activation_range == "max"
        assert not each.smoothing
    pipeline = pipeline_with(work, plain, behind, tmp_path, monkeypatch)
    variants = pipeline._variants(recipe, tmp_path / "bundle")
    more = ["smoothing"] * smoothed + ["sample-mean"] * (rule != "max")
    names = ["unquantized", *(methods if more else methods[:-1]), "+".join([methods[-1], *more])]
    assert [variant.name for variant in variants] == names
    assert [variant.bundle for variant in variants[:-1]] == [None] * (len(names) - 1)
    assert (variants[-1].bundle, variants[-1].recipe) == (tmp_path / "bundle", recipe)


def ones(linear: str) -> NDArray[np.float32]:
    return np.ones(64 if "o_proj" in linear else 80 if "down_proj" in linear else 48, np.float32)


def test_scales_per_token_have_no_range(
    calibration: Calibration,
    statistics: tuple[SpikeStatistics, SpikeStatistics],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = replace(calibration.options, activations="per-token", activation_range="mse")
    work = replace(calibration, options=options)
    recipe = build_recipe(work, CORPUS, statistics[0], NOTHING_KEPT)
    variants = pipeline_with(work, *statistics, tmp_path, monkeypatch)._variants(recipe, tmp_path / "bundle")
    assert [variant.name for variant in variants] == ["unquantized", "w8a8"]


def pipeline_with(
    calibration: Calibration, plain: SpikeStatistics, behind: SpikeStatistics, run: Path, monkeypatch: Any
) -> Pipeline:
    """A pipeline whose statistics are given."""
    job = Job("tiny", run, calibration=calibration.options)
    pipeline = Pipeline(job, calibration.checkpoint, RunDirectory(run), display=None)  # type: ignore[arg-type]
    pipeline.__dict__.update(corpus=CORPUS, calibration=calibration)
    monkeypatch.setattr("spike_export.pipeline.pipeline.load_spikes", lambda _: plain)
    monkeypatch.setattr(Pipeline, "_behind_recipe", lambda *_: behind)
    return pipeline


def test_without_quantization_there_is_one_variant(checkpoint_of: Checkpoint, tmp_path: Path) -> None:
    pipeline = Pipeline(Job("tiny", tmp_path), checkpoint_of, RunDirectory(tmp_path), display=None)  # type: ignore[arg-type]
    assert pipeline._variants(None, tmp_path / "b") == [Variant("unquantized", None, tmp_path / "b")]


@pytest.fixture
def checkpoint_of(model: TinyModel) -> Checkpoint:
    return model.checkpoint


def test_figures_by_position_and_window_are_those_of_their_parts() -> None:
    """Ranges of positions hold every position once; a window's loss is the mean over its own."""
    rows, targets = 100, np.zeros(100, np.int64)
    pairs = [(predictions(random_logits(each, rows), targets), random_logits(each + 9, rows)) for each in range(3)]
    parts = tuple(distances(*pair, targets) for pair in pairs)
    accuracy = Accuracy(parts)
    ranges = [slice(0, 16), slice(16, 64), slice(64, 100)]
    assert _ranges(rows) == ranges
    assert _ranges(16) == ranges[:1]
    assert _ranges(5) == [slice(0, 5)]
    means = [accuracy.at(each).divergence.mean for each in ranges]
    assert np.average(means, weights=[16, 48, 36]) == pytest.approx(accuracy.divergence.mean, rel=1e-12)
    assert means[1] == pytest.approx(np.mean([part.divergence[16:64] for part in parts]), rel=1e-12)
    assert accuracy.losses == tuple(part.negative.mean() for part in parts)
