"""Module names against the modules that the paper's authors excluded."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from spike_export.calibration.modules import linears, representatives, siblings, split_name
from spike_export.calibration.qfem import keep_above, keep_highest

PUBLISHED = Path(__file__).parent / "data" / "qfem_excluded_modules.json"

CASES = [
    # model, decoder layers, modules listed, linears after sibling expansion
    ("Llama-2-7b-hf", 32, 17, 19),
    ("Llama-2-13b-hf", 40, 6, 7),
    ("Llama-2-70b-hf", 80, 25, 26),
    ("Meta-Llama-3-70B", 80, 3, 4),
    ("Mistral-7B-v0.1", 32, 3, 3),
    ("SOLAR-10.7B-v1.0", 48, 11, 11),
]


def excluded(model: str) -> Mapping[str, float]:
    """Return our name of each published module → its ratio, highest first as published."""
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))["models"][model]
    return {f"model.{name}": ratio for name, ratio in published}


def all_ratios(model: str, layers: int) -> dict[str, float]:
    """Return a ratio for every representative: the published ones, and a smaller one for each that was quantized."""
    known = excluded(model)
    others = [name for name in representatives(layers) if name not in known]
    smallest = min(known.values())
    return dict(known) | {name: smallest * (1 - (rank + 1) / (len(others) + 2)) for rank, name in enumerate(others)}


def test_the_cases_are_all_that_is_published() -> None:
    assert {case[0] for case in CASES} == set(json.loads(PUBLISHED.read_text(encoding="utf-8"))["models"])


@pytest.mark.parametrize(("model", "layers", "listed", "expanded"), CASES)
def test_published_names_are_ours(model: str, layers: int, listed: int, expanded: int) -> None:
    names = tuple(excluded(model))
    assert len(names) == listed
    assert set(names) <= set(representatives(layers))
    assert len({linear for name in names for linear in siblings(name)}) == expanded
    for name in names:
        layer, module = split_name(name)
        assert f"model.layers.{layer}.{module}" == name
        assert 0 <= layer < layers


@pytest.mark.parametrize(("model", "layers", "listed", "expanded"), CASES)
def test_thresholds_reproduce_the_published_lists(model: str, layers: int, listed: int, expanded: int) -> None:
    ratios = all_ratios(model, layers)
    published = tuple(excluded(model))
    chosen = keep_highest(ratios, expanded)
    assert chosen.kept == published
    assert chosen.linears == expanded
    assert len(chosen.kept) == listed
    assert keep_above(ratios, chosen.alpha).kept == published
    # One linear less does not hold the list, and a threshold at the last published ratio drops the last module.
    assert keep_highest(ratios, expanded - 1).kept == published[:-1]
    assert keep_above(ratios, min(excluded(model).values())).kept == published[:-1]


def test_a_choice_ends_at_the_first_module_that_does_not_fit() -> None:
    ratios = {
        "model.layers.0.mlp.down_proj": 9.0,
        "model.layers.0.mlp.up_proj": 8.0,  # two linears
        "model.layers.1.mlp.down_proj": 7.0,
    }
    chosen = keep_highest(ratios, 2)
    assert chosen.kept == ("model.layers.0.mlp.down_proj",)
    assert chosen.alpha == 8.0


def test_every_linear_is_the_sibling_of_one_representative() -> None:
    assert [name.removeprefix("model.layers.1.") for name in linears(2)[7:]] == [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.up_proj",
        "mlp.gate_proj",
        "mlp.down_proj",
    ]
    assert len(set(linears(2))) == 14
    assert len(representatives(2)) == 8


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.k_proj", "model.layers.0.mlp.gate_proj"])
def test_a_sibling_is_no_representative(name: str) -> None:
    with pytest.raises(KeyError):
        siblings(name)


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.mlp.down_proj",  # as published, without "model."
        "lm_head",
        "model.layers.x.mlp.down_proj",
        "model.layers.0",
        "model.norm.weight.a",
    ],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is not the name of a decoder layer's module"):
        split_name(name)
