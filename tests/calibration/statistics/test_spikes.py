"""The max-median ratio against an independent formula, and the statistics' files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors.numpy import load_file, save_file

from spike_export.artifacts.errors import ArtifactError, RecipeError
from spike_export.artifacts.process import host_memory
from spike_export.artifacts.recipe import ActivationRange, activation_scale
from spike_export.calibration.decoder.layerwise import Decoder
from spike_export.calibration.statistics import room
from spike_export.calibration.statistics.description import load_description
from spike_export.calibration.statistics.measure import measure_spikes
from spike_export.calibration.statistics.room import require_statistics_room
from spike_export.calibration.statistics.spikes import ModuleSpikes, SpikeStatistics, load_spikes, save_spikes
from tests.support.tiny.families import tiny_family, tokens
from tests.support.tiny.models import tiny_llama

scales = arrays(
    np.float32,
    array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9),
    elements=st.floats(2.0**-20, 2.0**20, width=32),
)


def spikes(rows: list[list[float]]) -> ModuleSpikes:
    return token_spikes(np.array(rows, np.float32))


def token_spikes(token_amax: NDArray[np.float32]) -> ModuleSpikes:
    """Return statistics of which only the token maxima matter."""
    return ModuleSpikes(token_amax, np.zeros((len(token_amax), 1), np.float32), np.zeros(len(token_amax), np.float32))


def plain_ratio(rows: list[list[float]]) -> float:
    """Return the ratio by the definition, in double precision: per sample max / lower median, then the mean."""
    return sum(max(row) / sorted(row)[(len(row) - 1) // 2] for row in rows) / len(rows)


@settings(deadline=None)
@given(scales)
def test_ratio_is_the_definition(token_amax: NDArray[np.float32]) -> None:
    ratio = token_spikes(token_amax).ratio
    # One float32 division per sample, then a mean in double precision: half an ulp.
    assert ratio == pytest.approx(plain_ratio(token_amax.tolist()), rel=2.0**-23)


@settings(deadline=None)
@given(scales)
def test_median_is_torchs(token_amax: NDArray[np.float32]) -> None:
    # torch.median is what the reference code calls: the lower of two middle values.
    tensor = torch.from_numpy(token_amax)
    expected = (tensor.amax(dim=1) / tensor.median(dim=1).values).numpy()
    np.testing.assert_array_equal(token_spikes(token_amax).sample_ratios, expected)


@pytest.mark.parametrize(
    ("rows", "ratio"),
    [
        ([[1, 2, 8]], 4.0),  # odd: the middle
        ([[1, 2, 4, 8]], 4.0),  # even: the lower of 2 and 4, not their mean
        ([[7]], 1.0),
        ([[5, 1], [2, 2]], 3.0),  # samples first: 5 and 1; pooled it would be 5/2
        ([[1, 1, 1, 100], [1, 1, 1, 1]], 50.5),
        ([[2**24, 1, 1], [1, 1, 1], [1, 1, 1]], (2**24 + 2) / 3),  # in float32, the ones would be lost
    ],
)
def test_ratio_by_hand(rows: list[list[float]], ratio: float) -> None:
    assert spikes(rows).ratio == ratio


def test_a_dead_input_has_a_finite_ratio() -> None:
    assert spikes([[0.0, 0.0, 0.0]]).ratio == 0.0


def test_order_of_tokens_and_samples_does_not_matter() -> None:
    random = np.random.default_rng(0)
    values = random.uniform(1, 9, (4, 11)).astype(np.float32)
    shuffled = random.permuted(random.permutation(values), axis=1)
    assert token_spikes(shuffled).ratio == pytest.approx(token_spikes(values).ratio, rel=1e-12)


def test_range_rules() -> None:
    measured = spikes([[1, 10, 2], [3, 4, 2]])
    assert measured.range("max") == measured.amax == 10.0
    assert measured.range("sample-mean") == 7.0


def test_the_percentile_covers_999_of_1000_tokens() -> None:
    measured = spikes([[*range(1001), np.nan]])
    assert measured.range("percentile") == 999.0
    assert spikes([[np.nan]]).range("percentile") == 0.0


@settings(deadline=None)
@given(scales)
def test_the_mean_range_clips_but_never_below_the_mildest_sample(token_amax: NDArray[np.float32]) -> None:
    measured = token_spikes(token_amax)
    mildest = float(token_amax.max(axis=1).min())
    # The mean is one double rounding per sample away from exact.
    assert mildest * (1 - 1e-14) <= measured.range("sample-mean") <= measured.range("max") * (1 + 1e-14)


def test_activation_scale_is_a_float32_of_range_over_127() -> None:
    assert activation_scale(127.0) == 1.0
    scale = activation_scale(1.0)
    assert scale == float(np.float32(1 / 127))
    assert scale != 1 / 127
    assert activation_scale(0.0) > 0


@pytest.mark.parametrize("amax", [float("nan"), float("inf"), -1.0])
def test_an_overflowed_range_is_refused(amax: float) -> None:
    with pytest.raises(RecipeError, match="the calibration forward overflowed"):
        activation_scale(amax)


def statistics() -> SpikeStatistics:
    random = np.random.default_rng(3)

    def draw(high: float, *shape: int) -> NDArray[np.float32]:
        return random.uniform(0.1, high, shape).astype(np.float32)

    modules = {
        f"model.layers.{layer}.mlp.down_proj": ModuleSpikes(draw(1 + layer * 10, 2, 5), draw(1, 2, 7), draw(9, 2))
        for layer in (0, 1, 2)
    }
    # As an expert's: some tokens were not sent there, and none of the first sample.
    modules["model.layers.1.mlp.down_proj"].token_amax[0] = np.nan
    modules["model.layers.1.mlp.down_proj"].token_amax[1, 3] = np.nan
    return SpikeStatistics(
        modules,
        random.integers(0, 99, (2, 5)),
        (1, 4),
        np.array([3, 8]),
        draw(9, 2, 3),
        {f"model.layers.{layer}.self_attn": draw(9, 2, 3) for layer in (0, 1, 2)},
    )


def test_the_record_of_some_samples_is_theirs_alone() -> None:
    whole, rows = statistics(), np.array([1])
    part = whole.select(rows)
    for name, module in whole.modules.items():
        for array in ("token_amax", "sample_channel_amax", "output_amax"):
            np.testing.assert_array_equal(getattr(part.modules[name], array), getattr(module, array)[rows])
    for array in ("token_ids", "sample_ids", "hidden_amax"):
        np.testing.assert_array_equal(getattr(part, array), getattr(whole, array)[rows])
    assert part.prefix_ids == whole.prefix_ids
    assert list(part.operand_amax) == list(whole.operand_amax)
    for name, operands in whole.operand_amax.items():
        np.testing.assert_array_equal(part.operand_amax[name], operands[rows])


def test_range_and_peak() -> None:
    measured = ModuleSpikes(
        np.array([[1, 10, 2], [3, 4, 2]], np.float32),
        np.array([[10, 2], [1, 4]], np.float32),
        np.array([5, 60], np.float32),
    )
    assert measured.sample_amax.tolist() == [10.0, 4.0]
    assert measured.channel_amax.tolist() == [10.0, 4.0]
    assert measured.peak == 60.0
    scales = np.array([4, 1], np.float32)
    assert measured.smoothed_range(scales, "max") == 4.0  # samples: max(2.5, 2) and max(0.25, 4)
    assert measured.smoothed_range(scales, "sample-mean") == 3.25


@settings(deadline=None)
@given(
    arrays(np.float32, (3, 4, 5), elements=st.floats(-1000, 1000, width=32)),
    arrays(np.float32, 5, elements=st.floats(2.0**-15, 2.0**15, width=32)),
)
def test_the_range_of_a_scaled_input_needs_no_second_pass(
    inputs: NDArray[np.float32], scales: NDArray[np.float32]
) -> None:
    def measured(values: NDArray[np.float32]) -> ModuleSpikes:
        magnitudes = np.abs(values)
        return ModuleSpikes(magnitudes.max(axis=2), magnitudes.max(axis=1), np.zeros(3, np.float32))

    exact = [rule for rule in get_args(ActivationRange) if rule != "percentile"]
    assert measured(inputs).smoothed_range(scales, "percentile") == measured(inputs / scales).range("max")
    for rule in exact:
        # Division is monotonous, so that the largest quotient is the largest magnitude's: to the bit.
        assert measured(inputs).smoothed_range(scales, rule) == measured(inputs / scales).range(rule)


def test_ratios_are_sorted_and_ties_keep_execution_order() -> None:
    one, two = spikes([[1, 2, 8]]), spikes([[1, 1, 2]])
    measured = SpikeStatistics({"a": two, "c": one, "b": one}, np.zeros((1, 3), np.int64))
    assert list(measured.ratios().items()) == [("c", 4.0), ("b", 4.0), ("a", 2.0)]


def test_files_round_trip(tmp_path: Path) -> None:
    written = statistics()
    save_spikes(written, tmp_path / "spikes", {"key": "k"})
    read = load_spikes(tmp_path / "spikes")
    assert list(read.modules) == list(written.modules)
    for name, module in written.modules.items():
        for array in ("token_amax", "sample_channel_amax", "output_amax"):
            np.testing.assert_array_equal(getattr(read.modules[name], array), getattr(module, array))
    for array in ("token_ids", "sample_ids", "hidden_amax"):
        np.testing.assert_array_equal(getattr(read, array), getattr(written, array))
    assert list(read.operand_amax) == list(written.operand_amax)
    for name, operands in written.operand_amax.items():
        np.testing.assert_array_equal(read.operand_amax[name], operands)
    assert read.prefix_ids == (1, 4)
    assert read.ratios() == written.ratios()


def test_a_record_of_few_modules_round_trips(tmp_path: Path) -> None:
    written = SpikeStatistics({"m": spikes([[1, 2]])}, np.zeros((1, 2), np.int64))
    save_spikes(written, tmp_path / "spikes", {})
    read = load_spikes(tmp_path / "spikes")
    assert (read.hidden_amax.shape, read.operand_amax, read.sample_ids.tolist()) == ((0, 0), {}, [0])
    assert (written.hidden_amax.dtype, written.sample_ids.dtype) == (np.float32, np.int64)


def test_the_summary_says_quantiles_and_names_the_largest_tokens(tmp_path: Path) -> None:
    amax = np.array([[1, 1, 1, 1], [1, 1, 50, np.nan], [4, np.nan, np.nan, 3]], np.float32)
    tokens = np.arange(12).reshape(3, 4)
    module = ModuleSpikes(amax, np.zeros((3, 1), np.float32), np.array([1, 7, 2], np.float32))
    hidden = np.array([[1, 9], [3, 2], [2, 2]], np.float32)
    measured = SpikeStatistics({"m": module}, tokens, (), np.array([0, 4, 6]), hidden)
    save_spikes(measured, tmp_path / "spikes", {"corpus": "c"}, lambda token: f"<{token}\n>")
    text = (tmp_path / "spikes.json").read_text(encoding="utf-8")
    document = json.loads(text, parse_constant=pytest.fail)  # neither NaN nor Infinity
    summary = document["modules"]["m"]
    assert (document["format"], document["corpus"]) == (2, "c")
    assert document["hidden_amax"] == [3.0, 9.0]
    assert summary["ratio"] == pytest.approx((1 + 50 + 4 / 3) / 3)
    assert (summary["amax"], summary["output_amax"], summary["tokens"]) == (50.0, 7.0, 9)
    assert summary["quantiles"] == {
        share: pytest.approx(value, rel=0.01) for share, value in {"0.5": 1, "0.9": 4, "0.99": 4, "0.999": 4}.items()
    }
    assert summary["top_tokens"][:4] == [
        {"amax": 50.0, "token_id": 6, "sample": 4, "position": 2, "text": "<6\n>"},
        {"amax": 4.0, "token_id": 8, "sample": 6, "position": 0, "text": "<8\n>"},
        {"amax": 3.0, "token_id": 11, "sample": 6, "position": 3, "text": "<11\n>"},
        {"amax": 1.0, "token_id": 0, "sample": 0, "position": 0, "text": "<0\n>"},  # ties: as they stand
    ]
    assert len(summary["top_tokens"]) == 8
    assert [token.position for token in measured.top_tokens("m", 99)[3:]] == [0, 1, 2, 3, 0, 1]  # no token that is NaN


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize("file", ["spikes.json", "spikes.safetensors"])
@pytest.mark.parametrize("damage", [Path.unlink, truncate, lambda path: path.write_bytes(b"{}")])
def test_damaged_files_are_refused_with_the_remedy(tmp_path: Path, file: str, damage: Callable[[Path], object]) -> None:
    save_spikes(statistics(), tmp_path / "spikes", {})
    damage(tmp_path / file)
    with pytest.raises(ArtifactError, match=r"cannot read the spike statistics .*; calibrate again") as caught:
        load_spikes(tmp_path / "spikes")
    assert str(tmp_path / "spikes") in str(caught.value)


def test_what_a_description_does_not_say(tmp_path: Path) -> None:
    (tmp_path / "spikes.json").write_text('{"modules": {}}')
    found = load_description(tmp_path / "spikes")
    assert (found.key, found.samples, found.model, found.corpus) == (None, None, None, None)
    assert (found.prefix_ids, found.attentions, found.modules) == ((), (), {})


def test_a_description_is_read_only(tmp_path: Path) -> None:
    save_spikes(statistics(), tmp_path / "spikes", {"key": "k", "unknown": 1})
    with pytest.raises(ValidationError, match="frozen"):
        load_description(tmp_path / "spikes").key = "l"  # type: ignore[misc]


def test_a_damaged_description_is_named_by_its_key(tmp_path: Path) -> None:
    save_spikes(statistics(), tmp_path / "spikes", {"samples": "many"})
    with pytest.raises(ArtifactError, match=r"spikes\.json: cannot read the spike statistics \(samples: "):
        load_spikes(tmp_path / "spikes")


@pytest.mark.parametrize(
    ("array", "changed"),
    [
        ("token_ids", np.zeros((3, 4), np.int32)),
        ("token_ids", np.zeros(12, np.int64)),
        ("sample_ids", np.arange(2)),
        ("hidden_amax", np.zeros((2, 2), np.float32)),
        ("a.operand_amax", np.zeros((3, 2), np.float32)),
        ("m.token_amax", np.zeros((3, 5), np.float32)),
        ("m.sample_channel_amax", np.zeros((3, 0), np.float32)),
        ("m.output_amax", np.zeros(4, np.float32)),
    ],
)
def test_arrays_that_contradict_each_other_are_refused(tmp_path: Path, array: str, changed: np.ndarray) -> None:
    module = spikes([[1, 2, 3, 4]] * 3)
    hidden, operands = np.ones((3, 2), np.float32), {"a": np.ones((3, 3), np.float32)}
    written = SpikeStatistics({"m": module}, np.zeros((3, 4), np.int64), (), np.arange(3), hidden, operands)
    save_spikes(written, tmp_path / "spikes", {})
    load_spikes(tmp_path / "spikes")
    file = tmp_path / "spikes.safetensors"
    save_file(load_file(file) | {array: changed}, file)
    with pytest.raises(ArtifactError, match=f"cannot read the spike statistics .*{array.partition('.')[2] or array}"):
        load_spikes(tmp_path / "spikes")


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_the_estimated_room_is_that_of_three_copies(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, windows, asked = tiny_family(name).checkpoint, tokens(rows=3, length=9), []
    monkeypatch.setattr(room, "require_available", lambda needed, *_: asked.append(needed))
    require_statistics_room(checkpoint.config, *windows.shape)
    measured = measure_spikes(Decoder(checkpoint), windows).modules.values()
    arrays = (array for each in measured for array in (each.token_amax, each.sample_channel_amax, each.output_amax))
    assert asked == [3 * sum(array.nbytes for array in arrays)]


def test_samples_whose_statistics_exceed_the_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_llama().checkpoint.config
    monkeypatch.setattr(host_memory, "available_memory", lambda: 1 << 30)
    require_statistics_room(config, 1000, 512)
    with pytest.raises(RecipeError, match=r"--samples 100000 --length 512: .* about 5\.\d GiB of memory, 1\.0 GiB are"):
        require_statistics_room(config, 100_000, 512)
