"""What is derived of a configuration against what transformers builds of it, for every family."""

import tracemalloc
from collections.abc import Mapping
from typing import Any

import pytest

from spike_export.artifacts.errors import CheckpointError
from spike_export.checkpoint.checkpoint import validate_shapes
from spike_export.checkpoint.decoder_config import decoder_config, layer_shapes, linear_shapes, tensor_shapes
from spike_export.checkpoint.factors import Factors
from spike_export.checkpoint.families import FAMILIES
from tests.support.tiny.families import NAMES, PLAIN_CAUSAL, WINDOW, tiny_family

LONG_ROPE: Mapping[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 64,
}

EXPERTS = {"mixtral": (4, 2, 80), "qwen3_moe": (6, 3, 40)}
"""Experts, experts per token, channels of an expert."""


def raw(name: str, **changes: Any) -> dict[str, Any]:
    """Return the content of config.json."""
    settings = dict(tiny_family(name).reference.config.to_dict()) | changes
    return {key: value for key, value in settings.items() if value != "REMOVE"}


def test_every_family_is_tested() -> None:
    assert set(NAMES) == set(FAMILIES)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_tensors_are_those_that_transformers_stores(name: str, tie: bool) -> None:
    checkpoint = tiny_family(name, tie_word_embeddings=tie).checkpoint
    assert dict(checkpoint.tensors.shapes) == tensor_shapes(checkpoint.config)
    validate_shapes(checkpoint.config, checkpoint.tensors, "tiny")


@pytest.mark.parametrize("attention_bias", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma", "gemma2", "gemma3_text", "qwen3", "qwen3_moe"])
def test_biases_are_where_transformers_has_them(name: str, attention_bias: bool) -> None:
    mlp: dict[str, Any] = {"mlp_bias": True} if name == "llama" else {}
    checkpoint = tiny_family(name, attention_bias=attention_bias, **mlp).checkpoint
    assert dict(checkpoint.tensors.shapes) == tensor_shapes(checkpoint.config)
    assert any("q_proj.bias" in tensor for tensor in checkpoint.tensors.shapes) == attention_bias


def test_biases_that_a_family_always_has() -> None:
    config = tiny_family("qwen2").checkpoint.config
    assert {name for name in layer_shapes(config) if name.endswith("bias")} == {
        f"self_attn.{linear}_proj.bias" for linear in "qkv"
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_reads_alike_from_what_it_holds(name: str) -> None:
    config = tiny_family(name).checkpoint.config
    assert decoder_config(config.hf, "again") == config


@pytest.mark.parametrize("name", NAMES)
def test_sizes(name: str) -> None:
    config = tiny_family(name).checkpoint.config
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (48, 80, 4)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert config.head_dim == (12 if name in ("mixtral", "granite", "olmo2", "qwen2", "phi3") else 16)
    assert config.sliding_window == (None if name in PLAIN_CAUSAL else WINDOW)
    assert (config.num_experts, config.experts_per_token, config.expert_size) == EXPERTS.get(name, (0, 0, 0))
    assert linear_shapes(config)["self_attn.o_proj"] == (48, 4 * config.head_dim)


FACTORS: Mapping[str, Factors] = {
    "gemma": Factors(embedding=48**0.5, rounds_embedding=True),
    "gemma2": Factors(
        embedding=48**0.5, rounds_embedding=True, attention=0.25, attention_softcap=50.0, final_softcap=30.0
    ),
    "gemma3_text": Factors(embedding=48**0.5, rounds_embedding=True, attention=0.25),
    "granite": Factors(embedding=12.0, attention=0.15, residual=0.22, logits=8.0),
}


@pytest.mark.parametrize("name", NAMES)
def test_factors_are_the_familys_own(name: str) -> None:
    # What another family would scale by is nothing to this one.
    strange = {"attention_multiplier": 3.0, "logits_scaling": 3.0, "embedding_multiplier": 3.0}
    own = decoder_config(raw(name) | ({} if name == "granite" else strange), "x")
    assert own.factors == FACTORS.get(name, Factors())


def test_gemma_3_ignores_a_bound_of_the_scores_as_transformers_does() -> None:
    assert decoder_config(raw("gemma3_text", attn_logit_softcapping=50.0), "x").factors.attention_softcap is None


def test_a_window_that_is_switched_off_is_none() -> None:
    assert decoder_config(raw("qwen2", use_sliding_window=False), "x").sliding_window is None


def test_qwen3_has_a_window_where_it_is_switched_on() -> None:
    switched: dict[str, Any] = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    assert tiny_family("qwen3", **switched).checkpoint.config.sliding_window == WINDOW


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh"])
def test_gemmas_first_configurations_mean_the_tanh_form(activation: str) -> None:
    config = decoder_config(raw("gemma", hidden_act=activation), "x")
    assert config.hf["hidden_act"] == "gelu_pytorch_tanh"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "x: hidden_act is 'gelu'; supported for llama: silu"),
        (
            "gemma2",
            {"hidden_activation": "gelu"},
            "x: hidden_activation is 'gelu'; supported for gemma2: gelu_pytorch_tanh",
        ),
        ("mixtral", {"hidden_act": "relu"}, "x: hidden_act is 'relu'; supported for mixtral: silu"),
        ("mixtral", {"num_experts_per_tok": 5}, "x: 5 of 4 experts with intermediate_size 80: expected at least one"),
        ("qwen3_moe", {"num_experts_per_tok": 0}, "x: 0 of 6 experts with moe_intermediate_size 40: expected at"),
        ("qwen3_moe", {"num_experts_per_tok": None}, "x: transformers refuses this configuration: "),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "x: mlp_only_layers [1] mixes dense feed-forward blocks with experts"),
        (
            "qwen3_moe",
            {"decoder_sparse_step": 2},
            "x: decoder_sparse_step 2 mixes dense feed-forward blocks with experts",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "invented", "rope_theta": 1e4}},
            "x: rope type 'invented' is not supported (supported: default, linear, dynamic, llama3, yarn, longrope)",
        ),
        (
            "gemma3_text",
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "factor": 8.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                }
            },
            "x: rope type 'proportional' is not supported",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": "four"}},
            "x: rope_parameters of type 'yarn' are damaged: ",
        ),
        (
            "llama",
            {"rope_parameters": {**LONG_ROPE, "long_factor": [2.0] * 7}},
            "x: rope_parameters of type 'longrope' are damaged: ",
        ),
        (
            "gemma3_text",
            {"use_bidirectional_attention": True},
            "x: its attention is bidirectional (an embedding model)",
        ),
        ("llama", {"model_type": "gpt2"}, "x: architecture 'gpt2' is not supported (supported: gemma, gemma2,"),
        (
            "llama",
            {"intermediate_size": "REMOVE"},
            "x: missing intermediate_size; is this the model's own config.json?",
        ),
    ],
)
def test_what_is_not_supported_is_named(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        decoder_config(raw(name, **changes), "x")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", {"num_hidden_layers": 3 * 10**6}),
        ("qwen2", {"num_hidden_layers": 10**9}),
        ("mixtral", {"num_local_experts": 10**8}),
        ("llama", {"max_position_embeddings": 10**9}),
        ("llama", {"vocab_size": 2**40}),
        ("llama", {"hidden_size": True}),
    ],
)
def test_a_count_that_no_model_has_is_refused_before_anything_is_made_of_it(name: str, change: dict[str, Any]) -> None:
    raw = {**tiny_family(name).checkpoint.config.hf, **change}
    (key,) = change
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=f"^x: {key} is .*the file is damaged$"):
            decoder_config(raw, "x")
        assert tracemalloc.get_traced_memory()[1] < 50 << 20
    finally:
        tracemalloc.stop()
