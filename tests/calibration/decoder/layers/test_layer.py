"""The decoder's modules against transformers' whole model: every family, rope, window and precision, bit for bit."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from spike_export.artifacts.recipe import Dtype
from spike_export.calibration.decoder.layers.attention import attend, visible
from spike_export.calibration.decoder.layerwise import Decoder, Execution
from spike_export.checkpoint.checkpoint import Checkpoint
from tests.support.cached_forward import cached_logits
from tests.support.decoder_logits import largest_difference, logits, whole_logits
from tests.support.ropes import LONG, LONG_FACTORS, ROPES
from tests.support.tiny.families import MIXTURES, NAMES, WINDOW, tiny_family, tokens
from tests.support.tiny.models import LINEAR_ROPE, LLAMA3_ROPE

pytestmark = pytest.mark.usefixtures("one_thread")

PREFIX = (1, 7, 42)

LENGTHS = (1, 2, WINDOW - 1, WINDOW, WINDOW + 1, 24)
"""Windows of tokens around the sliding window, where the mask begins to matter."""

HALVES: tuple[Dtype, ...] = ("bfloat16", "float16")


def same_logits(name: str, actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether logits are the same: bit by bit, or for a mixture but for rounding.

    transformers computes the gates and ups of an expert as one product. Whether it sums up in the same order as two
    products depends on sizes and processor: sums of 48 float32 terms in another order differ by 48 * 2**-24 = 3e-6 at
    most, in each of 2 * 4 products. Seen: 6e-7.
    """
    return largest_difference(actual, expected) < 1e-5 if name in MIXTURES else torch.equal(actual, expected)


def rounded(reference: Any, dtype: Dtype) -> Any:
    """Return transformers' model with its weights in another precision."""
    half = AutoModelForCausalLM.from_config(reference.config, dtype=getattr(torch, dtype)).eval()
    half.load_state_dict(reference.state_dict())
    return half


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers_whole_model(name: str) -> None:
    model = tiny_family(name)
    for length in LENGTHS:
        ids = tokens(length=length)
        assert same_logits(name, logits(Decoder(model.checkpoint), ids), whole_logits(model.reference, ids)), length


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", [name for name in NAMES if name not in MIXTURES])
def test_half_precision_is_rounded_where_transformers_rounds(name: str, dtype: Dtype) -> None:
    model = tiny_family(name)
    half = rounded(model.reference, dtype)
    for length in LENGTHS:
        ids = tokens(length=length)
        actual = logits(Decoder(model.checkpoint, Execution(dtype=dtype)), ids)
        assert actual.dtype == getattr(torch, dtype)
        assert torch.equal(actual, whole_logits(half, ids)), length


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_in_half_precision_is_as_good_as_transformers(name: str, dtype: Dtype) -> None:
    """The experts' outputs are mixed in float32, as in the graph; transformers rounds shares and sums."""
    model, ids = tiny_family(name), tokens(rows=8)
    exact = whole_logits(model.reference, ids)
    found = logits(Decoder(model.checkpoint, Execution(dtype=dtype)), ids).float()
    theirs = whole_logits(rounded(model.reference, dtype), ids).float()
    # Per token, because a router that picks another expert changes a few tokens altogether.
    ours, reference = ((each - exact).pow(2).mean(-1).sqrt().median() for each in (found, theirs))
    assert 0 < ours < 1.1 * reference


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {"rope_parameters": dict(LLAMA3_ROPE)}),
    ("llama", {"rope_parameters": dict(LINEAR_ROPE)}),
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"num_key_value_heads": 1}),
    # Wider than the fused kernels' shared heads.
    ("llama", {"head_dim": 320}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 1}),
    ("mixtral", {"num_experts_per_tok": 1}),
    ("gemma2", {"layer_types": ["full_attention"] * 4}),
    ("gemma2", {"attn_logit_softcapping": 0.5, "final_logit_softcapping": None}),
    ("gemma3_text", {"tie_word_embeddings": False}),
    ("gemma3_text", {"final_logit_softcapping": 3.0}),
    ("granite", {"attention_bias": True, "embedding_multiplier": 12.1}),
    ("qwen2", {"use_sliding_window": False}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    ("qwen3", {"attention_bias": True}),
    ("qwen3_moe", {"moe_intermediate_size": 48, "norm_topk_prob": True}),
    ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
]


@pytest.mark.parametrize(("name", "changes"), VARIANTS)
def test_variants_of_a_family_are_exact_too(name: str, changes: dict[str, Any]) -> None:
    model, ids = tiny_family(name, **changes), tokens()
    expected = whole_logits(model.reference, ids)
    assert same_logits(name, logits(Decoder(model.checkpoint), ids), expected)
    if name not in MIXTURES:
        half = Execution(dtype="bfloat16")
        rounded_logits = whole_logits(rounded(model.reference, "bfloat16"), ids)
        assert torch.equal(logits(Decoder(model.checkpoint, half), ids), rounded_logits)
    # The variant is none in name only.
    assert largest_difference(whole_logits(tiny_family(name).reference, ids), expected) > 1e-3


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 12}
PLAIN_LONG = {key: value for key, value in LONG.items() if key != "factor"}

SCALINGS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    **ROPES,
    "yarn, magnitude stated": ("llama", {"rope_parameters": {**YARN, "attention_factor": 0.7}}),
    "yarn, two scales": ("llama", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}}),
    "yarn, other ramp": (
        "llama",
        {"rope_parameters": {**YARN, "beta_fast": 4.0, "beta_slow": 0.3, "truncate": False}},
    ),
    "longrope, magnitude stated": (
        "llama",
        {
            "rope_parameters": {
                **LONG,
                "short_factor": [1.1] * 8,
                "long_factor": LONG_FACTORS,
                "attention_factor": 0.7,
            }
        },
    ),
    "longrope without a factor": (
        "llama",
        {"rope_parameters": {**PLAIN_LONG, "short_factor": [1.1] * 8, "long_factor": LONG_FACTORS}},
    ),
    "dynamic, factor no power of two": (
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.3},
            "max_position_embeddings": 12,
        },
    ),
    "partial and odd": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.8}},
    ),
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_every_rope_is_exact_within_and_beyond_the_original_length(kind: str) -> None:
    family, changes = SCALINGS[kind]
    for length in (6, 12, 13, 24):
        # A new model each time: transformers' dynamic rope remembers the longest sequence.
        model, ids = tiny_family(family, **changes), tokens(length=length)
        assert torch.equal(logits(Decoder(model.checkpoint), ids), whole_logits(model.reference, ids)), length
        half = rounded(model.reference, "bfloat16")
        actual = logits(Decoder(model.checkpoint, Execution(dtype="bfloat16")), ids)
        assert torch.equal(actual, whole_logits(half, ids)), length


@pytest.mark.parametrize("kind", SCALINGS)
def test_every_rope_behind_a_prefix_is_that_of_a_cache(kind: str) -> None:
    family, changes = SCALINGS[kind]
    for length in (6, 20):
        # The cache forgets a prefix beyond the window, which every token of ours sees.
        model = tiny_family(family, **{**changes, **({"sliding_window": None} if family == "phi3" else {})})
        # One window: the prefix passes the layers once, whatever the number of windows.
        ids = tokens(rows=1, length=length)
        expected = torch.from_numpy(cached_logits(model, ids, (length,), PREFIX))
        assert torch.equal(logits(Decoder(model.checkpoint), ids, PREFIX), expected), length


def altered(checkpoint: Checkpoint, family: Mapping[str, Any], factors: Mapping[str, Any]) -> Checkpoint:
    """Return the checkpoint with another row in the table of families."""
    config = checkpoint.config
    row, numbers = replace(config.family, **family), replace(config.factors, **factors)
    return replace(checkpoint, config=replace(config, family=row, factors=numbers))


FAULTS: list[tuple[str, Dtype, dict[str, Any], dict[str, Any]]] = [
    ("gemma", "float32", {"norm_offset": 0.0}, {}),
    ("gemma", "float32", {}, {"embedding": 1.0}),
    ("gemma", "bfloat16", {}, {"rounds_embedding": False}),
    ("gemma", "bfloat16", {"float32_gain": False}, {}),
    ("gemma", "float32", {"activation": "silu"}, {}),
    ("gemma2", "float32", {"sliding_window": False}, {}),
    ("gemma2", "float32", {}, {"attention": None}),
    ("gemma2", "float32", {}, {"attention_softcap": None}),
    ("gemma3_text", "float32", {"post_norms": ()}, {}),
    ("granite", "float32", {}, {"residual": 1.0}),
    ("granite", "float32", {}, {"logits": 1.0}),
    ("llama", "float32", {"activation": "gelu_pytorch_tanh"}, {}),
    ("llama", "bfloat16", {"float32_gain": True}, {}),
    ("llama", "bfloat16", {"float32_rotation": True}, {}),
    ("olmo2", "bfloat16", {"float32_gain": False}, {}),
    ("olmo2", "bfloat16", {"float32_rotation": False}, {}),
    ("olmo2", "float32", {"post_norms": ()}, {}),
    ("qwen3", "float32", {"qk_norm": None}, {}),
]


@pytest.mark.parametrize(("name", "dtype", "family", "factors"), FAULTS)
def test_a_wrong_entry_in_the_table_shows(
    name: str, dtype: Dtype, family: dict[str, Any], factors: dict[str, Any]
) -> None:
    model, ids = tiny_family(name, **({"query_pre_attn_scalar": 20} if name == "gemma2" else {})), tokens()
    expected = whole_logits(rounded(model.reference, dtype), ids)
    execution = Execution(dtype=dtype)
    assert torch.equal(logits(Decoder(model.checkpoint, execution), ids), expected)
    faulty = altered(model.checkpoint, family, factors)
    if "sliding_window" in family:
        faulty = replace(faulty, config=replace(faulty.config, sliding_window=None))
    assert not torch.equal(logits(Decoder(faulty, execution), ids), expected)


@given(past=st.integers(0, 5), count=st.integers(1, 7), window=st.none() | st.integers(1, 14))
def test_a_mask_shows_the_prefix_and_what_lies_inside_the_window(past: int, count: int, window: int | None) -> None:
    seen = np.array(
        [
            [key <= query and (window is None or query - key < window or key < past) for key in range(past + count)]
            for query in range(past, past + count)
        ]
    )
    mask = visible(past, count, window)
    if mask is not None:
        np.testing.assert_array_equal(mask[0, 0].numpy(), seen)
        return
    # Left out: one token that sees all, or plain causality from the first token on.
    if count > 1:
        assert past == 0
        assert seen.tolist() == np.tril(np.ones((count, count), bool)).tolist()
    else:
        assert seen.all()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize(("past", "count", "window"), [(0, 9, None), (0, 9, 3), (2, 9, 4), (2, 1, None), (3, 1, 2)])
def test_attention_is_its_formula(
    kv_heads: int, softcap: float | None, past: int, count: int, window: int | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, length, 8, generator=generator)
        for heads, length in ((4, count), (kv_heads, past + count), (kv_heads, past + count))
    )
    actual = attend(query, key, value, visible(past, count, window), 0.3, softcap)
    q, k, v = (each.double() for each in (query, key, value))
    for head in range(4):
        shared = head // (4 // kv_heads)
        scores = q[:, head] @ k[:, shared].transpose(1, 2) * 0.3
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        mask = visible(past, count, window)
        seen = torch.ones(count, past + count).tril(past).bool() if mask is None else mask[0, 0]
        weights = torch.exp(scores) * seen
        expected = weights / weights.sum(-1, keepdim=True) @ v[:, shared]
        # Scores are sums of 8 products of size 3 or so; the softmax and the mix add some 2**-24 each. Seen: 5e-7.
        assert (actual[:, head] - expected).abs().max() < 5e-6
