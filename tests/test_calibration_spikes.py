"""The max-median ratio against an independent formula, and the statistics' files."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray

from spike_export.calibration.errors import ArtifactError, RecipeError
from spike_export.calibration.recipe import activation_scale
from spike_export.calibration.spikes import ModuleSpikes, SpikeStatistics, load_spikes, save_spikes

scales = arrays(
    np.float32,
    array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9),
    elements=st.floats(2.0**-20, 2.0**20, width=32),
)


def spikes(rows: list[list[float]]) -> ModuleSpikes:
    return ModuleSpikes(np.array(rows, np.float32), np.zeros(1, np.float32))


def plain_ratio(rows: list[list[float]]) -> float:
    """Return the ratio by the definition, in double precision: per sample max / lower median, then the mean."""
    return sum(max(row) / sorted(row)[(len(row) - 1) // 2] for row in rows) / len(rows)


@settings(deadline=None)
@given(scales)
def test_ratio_is_the_definition(token_amax: NDArray[np.float32]) -> None:
    ratio = ModuleSpikes(token_amax, np.zeros(1, np.float32)).ratio
    # One float32 division per sample, then a mean in double precision: half an ulp.
    assert ratio == pytest.approx(plain_ratio(token_amax.tolist()), rel=2.0**-23)


@settings(deadline=None)
@given(scales)
def test_median_is_torchs(token_amax: NDArray[np.float32]) -> None:
    # torch.median is what the reference code calls: the lower of two middle values.
    tensor = torch.from_numpy(token_amax)
    expected = (tensor.amax(dim=1) / tensor.median(dim=1).values).numpy()
    np.testing.assert_array_equal(ModuleSpikes(token_amax, np.zeros(1, np.float32)).sample_ratios, expected)


@pytest.mark.parametrize(
    ("rows", "ratio"),
    [
        ([[1, 2, 8]], 4.0),  # odd: the middle
        ([[1, 2, 4, 8]], 4.0),  # even: the lower of 2 and 4, not their mean
        ([[7]], 1.0),
        ([[5, 1], [2, 2]], 3.0),  # samples first: 5 and 1; pooled it would be 5/2
        ([[1, 1, 1, 100], [1, 1, 1, 1]], 50.5),
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
    assert ModuleSpikes(shuffled, values[0]).ratio == pytest.approx(ModuleSpikes(values, values[0]).ratio, rel=1e-12)


def test_range_rules() -> None:
    measured = spikes([[1, 10, 2], [3, 4, 2]])
    assert measured.range("max") == measured.amax == 10.0
    assert measured.range("sample-mean") == 7.0


@settings(deadline=None)
@given(scales)
def test_the_mean_range_clips_but_never_below_the_mildest_sample(token_amax: NDArray[np.float32]) -> None:
    measured = ModuleSpikes(token_amax, np.zeros(1, np.float32))
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
    modules = {
        f"model.layers.{layer}.mlp.down_proj": ModuleSpikes(
            random.uniform(0.1, 1 + layer * 10, (2, 5)).astype(np.float32),
            random.uniform(0.1, 1, 7).astype(np.float32),
        )
        for layer in (0, 1, 2)
    }
    return SpikeStatistics(modules, random.integers(0, 99, (2, 5)), (1, 4))


def test_ratios_are_sorted_and_ties_keep_execution_order() -> None:
    one, two = spikes([[1, 2, 8]]), spikes([[1, 1, 2]])
    measured = SpikeStatistics({"a": two, "c": one, "b": one}, np.zeros((1, 3), np.int64))
    assert list(measured.ratios().items()) == [("c", 4.0), ("b", 4.0), ("a", 2.0)]


def test_files_round_trip(tmp_path: Path) -> None:
    written = statistics()
    save_spikes(written, tmp_path / "spikes", {"model": "tiny"})
    read = load_spikes(tmp_path / "spikes")
    assert list(read.modules) == list(written.modules)
    for name, module in written.modules.items():
        np.testing.assert_array_equal(read.modules[name].token_amax, module.token_amax)
        np.testing.assert_array_equal(read.modules[name].channel_amax, module.channel_amax)
    np.testing.assert_array_equal(read.token_ids, written.token_ids)
    assert read.prefix_ids == (1, 4)
    assert read.ratios() == written.ratios()


def test_the_summary_names_the_token_with_the_largest_scale(tmp_path: Path) -> None:
    amax = np.ones((2, 4), np.float32)
    amax[1, 2] = 50.0
    tokens = np.arange(8).reshape(2, 4)
    save_spikes(SpikeStatistics({"m": ModuleSpikes(amax, amax[0])}, tokens), tmp_path / "spikes", {"corpus": "c"})
    document = json.loads((tmp_path / "spikes.json").read_text())
    assert document["corpus"] == "c"
    assert document["modules"]["m"] == {
        "ratio": 25.5,
        "amax": 50.0,
        "median": 1.0,
        "top_token": {"token_id": 6, "sample": 1, "position": 2},
    }


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
