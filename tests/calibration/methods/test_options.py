"""Options and constants of a calibration: where their ranges end, what they mean together, what holds by default."""

from collections.abc import Mapping
from typing import Any

import pytest

from spike_export.artifacts.errors import RecipeError
from spike_export.calibration.methods import (
    activation_choice,
    context,
    head_smoothing,
    prefix_choice,
    smoothing_search,
    transform_choice,
)
from spike_export.calibration.methods.options import CalibrationOptions

RANGES: dict[str, tuple[list[Any], list[Any]]] = {
    "samples": ([1, 100_000], [0, 100_001]),
    "length": ([8], [7]),
    "seed": ([0, 2**63 - 1], [-1, 2**63]),
    "alpha": ([None, 0.0, -1.0, 1e9], [float("nan"), float("inf")]),
    "max_fp16_modules": ([None, 0, 99], [-1]),
    "max_fp16_share": ([0.0, 1.0], [-0.01, 1.01, float("nan")]),
    "max_per_token_share": ([0.0, 1.0], [-0.01, 1.01, float("nan")]),
    "prefix_length": ([1, 5], [0, 6]),
    "tolerance": ([0.0, 0.99], [-0.01, 1.0, float("nan")]),
}
"""Option → values inside its range, up to its ends; the nearest values outside."""


@pytest.mark.parametrize("name", RANGES)
def test_where_an_options_range_ends(name: str) -> None:
    inside, outside = RANGES[name]
    for value in inside:
        CalibrationOptions(**{name: value})
    for value in outside:
        with pytest.raises(RecipeError, match=f"^--{name.replace('_', '-')} is {value}; "):
            CalibrationOptions(**{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "--samples is 0; at least one window is needed"),
        ({"length": 7}, "--length is 7; a window needs at least 8 tokens"),
        ({"alpha": 3.0, "max_fp16_modules": 1}, "--alpha and --max-fp16-modules both say"),
        (
            {"attention": "int8-per-tensor-static", "kv_cache_dtype": "int8"},
            "--attention int8-per-tensor-static and --kv-cache-dtype int8 both round keys and values; give one",
        ),
        ({"max_fp16_modules": -1}, "--max-fp16-modules is -1; expected 0 or more"),
        ({"tolerance": 1.0}, "--tolerance is 1.0; expected a fraction such as 0.005"),
        ({"tolerance": -0.1}, "--tolerance is -0.1; expected a fraction"),
        ({"max_fp16_share": 1.1}, "--max-fp16-share is 1.1; expected a share such as 0.05"),
        ({"max_fp16_share": -0.1}, "--max-fp16-share is -0.1; expected a share"),
        ({"max_fp16_share": float("nan")}, "--max-fp16-share is nan; expected a share"),
        ({"prefix_length": 0}, "--prefix-length is 0; expected 1 to 5 tokens"),
        ({"prefix_length": 6}, "--prefix-length is 6; expected 1 to 5 tokens"),
    ],
)
def test_senseless_options_are_refused(options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        CalibrationOptions(**options)
    assert str(caught.value).startswith(message)


def test_the_defaults_are_those_of_the_command_line() -> None:
    written_out = CalibrationOptions(
        samples=32,
        length=512,
        seed=0,
        windows="packed",
        weights="int8-per-channel",
        activations="auto",
        activation_range="sample-mean",
        excluded_weights="unquantized",
        attention="unquantized",
        head="unquantized",
        dtype="float16",
        qfem=True,
        qfep=True,
        prefix_length=5,
        smoothing=True,
        rotation="never",
        alpha=None,
        max_fp16_modules=None,
        max_fp16_share=0.05,
        max_per_token_share=0.3,
        tolerance=0.005,
    )
    assert CalibrationOptions() == written_out


@pytest.mark.parametrize(
    ("fields", "kind"),
    [({}, "static"), ({"activations": "static"}, "static"), ({"activations": "per-token"}, "per-token")],
)
def test_what_is_searched_where_each_input_has_a_kind_of_its_own(fields: dict[str, Any], kind: str) -> None:
    assert CalibrationOptions(**fields).searched_activations == kind


@pytest.mark.parametrize(
    ("fields", "searches"),
    [
        ({"smoothing": True}, True),
        ({"smoothing": False}, False),
        ({"smoothing": False, "activation_range": "mse"}, True),
        ({"smoothing": False, "rotation": "auto"}, True),
        ({"smoothing": False, "rotation": "always"}, True),
    ],
)
def test_when_inputs_are_searched(fields: dict[str, Any], searches: bool) -> None:
    assert CalibrationOptions(**fields).searches_smoothing is searches


@pytest.mark.parametrize(
    ("candidates", "forms"),
    [
        (smoothing_search.CANDIDATES, {"smoothquant", "smoothquant-typical", "outlier-suppression"}),
        (head_smoothing.CANDIDATES, {"smoothquant", "outlier-suppression"}),
    ],
)
def test_candidates_are_formulas_with_strengths_in_order(
    candidates: tuple[tuple[str, float], ...], forms: set[str]
) -> None:
    assert {form for form, _ in candidates} == forms
    assert all(0 < strength < 1 for _, strength in candidates)
    assert len(set(candidates)) == len(candidates)


def test_constants_that_are_shares() -> None:
    clips = smoothing_search.CLIPS
    assert clips[0] == 1
    assert sorted(clips, reverse=True) == list(clips)
    shares = (
        *clips[1:],
        smoothing_search.FLOOR_QUANTILE,
        activation_choice.WORTH,
        prefix_choice.NEUTRALITY,
        prefix_choice._WORTH,
        transform_choice.UNTYING,
    )
    assert all(0 < share < 1 for share in shares)


def test_how_much_a_search_looks_at() -> None:
    assert (context.PEAK_STRIDE, context.SEARCH_WINDOWS, prefix_choice._PROPOSALS) == (8, 8, 4)
    assert head_smoothing.JUDGED_TOKENS == 512
    stride = smoothing_search.SmoothingSearch.stride_of
    assert [stride(tokens) for tokens in (1, 1024, 2047, 2048, 10_240)] == [1, 1, 1, 2, 10]
