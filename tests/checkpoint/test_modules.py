"""Module names against the modules that the paper's authors excluded."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from spike_export.calibration.methods.qfem import Scores
from spike_export.checkpoint.decoder_config import DecoderConfig, linear_shapes
from spike_export.checkpoint.modules import (
    expert_of,
    input_sites,
    is_down_projection,
    is_router,
    linears,
    representative_of,
    representatives,
    siblings,
    split_name,
)
from tests.support.tiny.families import NAMES, tiny_family

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


def config(layers: int, name: str = "llama") -> DecoderConfig:
    return replace(tiny_family(name).checkpoint.config, num_hidden_layers=layers)


def excluded(model: str) -> Mapping[str, float]:
    """Return our name of each published module → its ratio, highest first as published."""
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))["models"][model]
    return {f"model.{name}": ratio for name, ratio in published}


def all_ratios(model: str, layers: int) -> dict[str, float]:
    """Return a ratio for every representative: the published ones, and a smaller one for each that was quantized."""
    known = excluded(model)
    others = [name for name in representatives(config(layers)) if name not in known]
    smallest = min(known.values())
    return dict(known) | {name: smallest * (1 - (rank + 1) / (len(others) + 2)) for rank, name in enumerate(others)}


def test_the_cases_are_all_that_is_published() -> None:
    assert {case[0] for case in CASES} == set(json.loads(PUBLISHED.read_text(encoding="utf-8"))["models"])


@pytest.mark.parametrize(("model", "layers", "listed", "expanded"), CASES)
def test_published_names_are_ours(model: str, layers: int, listed: int, expanded: int) -> None:
    names = tuple(excluded(model))
    assert len(names) == listed
    assert set(names) <= set(representatives(config(layers)))
    assert len({linear for name in names for linear in siblings(name)}) == expanded
    for name in names:
        layer, module = split_name(name)
        assert f"model.layers.{layer}.{module}" == name
        assert 0 <= layer < layers


@pytest.mark.parametrize(("model", "layers", "listed", "expanded"), CASES)
def test_thresholds_reproduce_the_published_lists(model: str, layers: int, listed: int, expanded: int) -> None:
    scores = Scores.sorted("ratio", all_ratios(model, layers), config(layers))
    published = tuple(excluded(model))
    chosen = scores.keep_highest(expanded)
    assert chosen.kept == published
    assert chosen.linears == expanded
    assert len(chosen.kept) == listed
    assert scores.keep_above(chosen.alpha).kept == published
    # One linear less does not hold the list, and a threshold at the last published ratio drops the last module.
    assert scores.keep_highest(expanded - 1).kept == published[:-1]
    assert scores.keep_above(min(excluded(model).values())).kept == published[:-1]


def test_a_choice_ends_at_the_first_module_that_does_not_fit() -> None:
    ratios = {
        "model.layers.0.mlp.down_proj": 9.0,
        "model.layers.0.mlp.up_proj": 8.0,  # two linears
        "model.layers.1.mlp.down_proj": 7.0,
    }
    chosen = Scores.sorted("ratio", ratios, config(2)).keep_highest(2)
    assert chosen.kept == ("model.layers.0.mlp.down_proj",)
    assert chosen.alpha == 8.0


LAYERS: dict[str, list[tuple[str, ...]]] = {
    "llama": [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.up_proj", "mlp.gate_proj"),
        ("mlp.down_proj",),
    ],
    "phi3": [("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)],
    "mixtral": [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("block_sparse_moe.gate",),
        *(
            tuple(f"block_sparse_moe.experts.{expert}.{name}" for name in names)
            for expert in range(4)
            for names in (("w3", "w1"), ("w2",))
        ),
    ],
    "qwen3_moe": [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate",),
        *(
            tuple(f"mlp.experts.{expert}.{name}" for name in names)
            for expert in range(6)
            for names in (("up_proj", "gate_proj"), ("down_proj",))
        ),
    ],
}


@pytest.mark.parametrize("name", NAMES)
def test_the_linears_of_a_layer_by_shared_input(name: str) -> None:
    small = config(2, name)
    expected = [tuple(f"model.layers.1.{linear}" for linear in site) for site in LAYERS.get(name, LAYERS["llama"])]
    assert [siblings(site[0]) for site in expected] == expected
    assert representatives(small)[len(expected) :] == tuple(site[0] for site in expected)
    assert linears(small) == tuple(
        linear.replace("layers.1", f"layers.{layer}") for layer in range(2) for site in expected for linear in site
    )
    assert set(linear_shapes(small)) == {split_name(linear)[1] for linear in linears(small)}


@pytest.mark.parametrize("name", NAMES)
def test_a_producer_makes_the_tensor_that_its_readers_read(name: str) -> None:
    small = config(1, name)
    shapes = linear_shapes(small)
    norms = {"gemma2": "pre_feedforward_layernorm", "gemma3_text": "pre_feedforward_layernorm"}
    for site in input_sites(small):
        assert {shapes[reader][1] for reader in site.readers} == {shapes[site.representative][1]}
        if name == "olmo2" and not site.behind_linear:
            assert site.producer is None
            continue
        assert site.producer is not None
        assert site.behind_norm != site.behind_linear
        if "." in site.producer:
            assert shapes[site.producer][0] >= shapes[site.representative][1] // 2
        elif site.representative.startswith("self_attn"):
            assert site.producer == "input_layernorm"
        else:
            assert site.producer == norms.get(name, "post_attention_layernorm")


def test_mixtral_has_the_reference_codes_module_set() -> None:
    # arXiv 2405.14428's code: 19 representatives a layer, of which the published lists name 191 of 608.
    mixtral = replace(config(32, "mixtral"), num_experts=8)
    assert len(representatives(mixtral)) == 608
    assert len(linears(mixtral)) == 928


def test_experts_and_routers_are_known_by_name() -> None:
    assert expert_of("model.layers.3.block_sparse_moe.experts.11.w2") == 11
    assert expert_of("model.layers.3.block_sparse_moe.gate") is None
    assert expert_of("model.layers.3.mlp.down_proj") is None
    assert expert_of("mlp.experts.127.down_proj") == 127
    assert is_router("mlp.gate")
    assert not is_router("model.layers.3.mlp.experts.0.gate_proj")
    assert is_router("model.layers.3.block_sparse_moe.gate")
    assert not is_router("model.layers.3.mlp.gate_proj")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.experts.0.gate_proj",
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.block_sparse_moe.experts.0.w1",
    ],
)
def test_a_sibling_is_no_representative(name: str) -> None:
    with pytest.raises(KeyError):
        siblings(name)


@pytest.mark.parametrize("name", NAMES)
def test_every_linear_knows_who_stands_for_it(name: str) -> None:
    for representative in representatives(config(2, name)):
        assert {representative_of(linear) for linear in siblings(representative)} == {representative}


@pytest.mark.parametrize("name", NAMES)
def test_the_down_projections_write_the_residual_stream(name: str) -> None:
    small = config(1, name)
    downs = {module for module in linears(small) if is_down_projection(module)}
    assert len(downs) == max(1, small.num_experts)
    producers = {site.representative: site.producer for site in input_sites(small)}
    assert all("." in producers[split_name(module)[1]] for module in downs)


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
