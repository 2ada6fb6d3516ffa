"""The reference model against transformers, the simulation against integer arithmetic, perplexity against torch."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from spike_export.calibration.measure import measure_spikes
from spike_export.calibration.modules import linears, representatives
from spike_export.calibration.perplexity import Likelihood, model_perplexity, with_bos
from spike_export.calibration.prefix_cache import prefix_key_values
from spike_export.calibration.recipe import WeightScheme
from spike_export.calibration.reference_model import ReferenceModel, batches, load_reference_model
from spike_export.calibration.simulate import QuantizedWeights, fake_quantize, simulated
from tests.tiny_models import LINEAR_ROPE, LLAMA3_ROPE, TinyModel, tiny_llama

PREFIX = (1, 7, 42)
FAMILIES: list[dict[str, Any]] = [
    {},
    {"biases": True, "tie": True},
    {"rope": LLAMA3_ROPE},
    {"rope": LINEAR_ROPE},
    {"sliding_window": 8},  # shorter than the windows, longer than the prefix
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Let torch use one thread: products this small lose more to waiting for a second than it computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tokens(rows: int = 3, length: int = 20, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(3, 99, (rows, length))


def hf_states(model: TinyModel, ids: NDArray[np.int64]) -> torch.Tensor:
    with torch.inference_mode():
        states: torch.Tensor = model.reference.model(input_ids=torch.from_numpy(ids), use_cache=False).last_hidden_state
    return states


def rounding_error(model: TinyModel, ids: NDArray[np.int64]) -> float:
    """Return how far transformers' own float32 result lies from its float64 result."""
    single = hf_states(model, ids)
    model.reference.double()
    try:
        double = hf_states(model, ids)
    finally:
        model.reference.float()  # back to the very same float32 weights
    return float((single - double).abs().max())


def behind_prefix(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([np.tile(PREFIX, (len(ids), 1)), ids], axis=1)


@pytest.mark.parametrize("case", FAMILIES)
def test_a_prefix_as_key_values_equals_the_prefix_before_the_tokens(case: dict[str, Any]) -> None:
    model, ids = tiny_llama(**case), tokens()
    whole = behind_prefix(ids)
    # Both sides round in float32, in another order: each is about this far from the exact result.
    tolerance = 4 * rounding_error(model, whole)
    ours = load_reference_model(model.checkpoint)
    cached = ours.with_prefix(prefix_key_values(model.checkpoint, PREFIX)).hidden_states(ids)
    expected = hf_states(model, whole)[:, len(PREFIX) :]
    assert tolerance < 1e-4
    assert float((cached - expected).abs().max()) <= tolerance
    # Must fail: another prefix, or none.
    for prefix in (None, prefix_key_values(model.checkpoint, (1, 42, 7))):
        assert float((ours.with_prefix(prefix).hidden_states(ids) - expected).abs().max()) > 100 * tolerance


@pytest.mark.parametrize("case", FAMILIES)
def test_key_values_are_transformers_own_cache(case: dict[str, Any]) -> None:
    model = tiny_llama(**case)
    cache = DynamicCache()
    with torch.inference_mode():
        model.reference.model(input_ids=torch.tensor([PREFIX]), past_key_values=cache, use_cache=True)
    ours = prefix_key_values(model.checkpoint, PREFIX)
    assert len(ours) == len(cache.layers)
    for (key, value), layer in zip(ours, cache.layers, strict=True):
        assert key.shape == (2, len(PREFIX), 16)
        # Entries are below 10; a dozen float32 roundings of sums of 48 products.
        np.testing.assert_allclose(key, layer.keys[0].numpy(), atol=2e-5)
        np.testing.assert_allclose(value, layer.values[0].numpy(), atol=2e-5)


@pytest.mark.parametrize("case", FAMILIES)
def test_without_a_prefix_it_is_transformers(case: dict[str, Any]) -> None:
    model, ids = tiny_llama(**case), tokens()
    states = load_reference_model(model.checkpoint).hidden_states(ids)
    assert float((states - hf_states(model, ids)).abs().max()) <= 4 * rounding_error(model, ids)


def test_a_forward_does_not_lengthen_the_prefix() -> None:
    model = tiny_llama()
    ours = load_reference_model(model.checkpoint).with_prefix(prefix_key_values(model.checkpoint, PREFIX))
    first, second = ours.hidden_states(tokens()), ours.hidden_states(tokens())
    assert torch.equal(first, second)
    assert ours.prefix is not None
    assert ours.prefix[0][0].shape[1] == len(PREFIX)


def test_logits_are_transformers() -> None:
    for model in (tiny_llama(), tiny_llama(tie=True)):
        ours = load_reference_model(model.checkpoint)
        with torch.inference_mode():
            expected = model.reference(torch.from_numpy(tokens())).logits
        actual = ours.logits(ours.hidden_states(tokens()))
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)  # logits up to 10, sums of 48 products


def test_truncation_changes_nothing_before_it() -> None:
    model = load_reference_model(tiny_llama(layers=3).checkpoint)
    module = "model.layers.1.mlp.down_proj"
    whole = measure_spikes(model, tokens()).modules[module]
    with model.only_layers(2):
        assert len(model.causal_lm.model.layers) == 2
        early = measure_spikes(model, tokens(), modules=(module,))
    assert list(early.modules) == [module]
    np.testing.assert_array_equal(early.modules[module].token_amax, whole.token_amax)
    np.testing.assert_array_equal(early.modules[module].channel_amax, whole.channel_amax)
    assert len(model.causal_lm.model.layers) == 3


def test_truncation_really_skips_the_later_layers() -> None:
    model = load_reference_model(tiny_llama(layers=3).checkpoint)
    late: list[str] = []
    with model.only_layers(1), model.observed(lambda name, _: late.append(name)):
        model.hidden_states(tokens())
    assert late == list(representatives(1))


def test_a_failure_inside_leaves_the_model_whole() -> None:
    model = load_reference_model(tiny_llama(layers=3).checkpoint)
    before = model.hidden_states(tokens())
    with pytest.raises(ZeroDivisionError), model.only_layers(1), model.observed(lambda *_: 1 / 0):
        model.hidden_states(tokens())
    assert torch.equal(model.hidden_states(tokens()), before)


def test_statistics_are_the_inputs_maxima() -> None:
    model, ids = tiny_llama(), tokens(rows=300, length=16)
    assert len(batches(ids)) > 2  # several forward calls
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in representatives(2)}
    handles = [
        model.reference.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: inputs[name].append(args[0])
        )
        for name in inputs
    ]
    hf_states(model, ids)
    for handle in handles:
        handle.remove()
    seen: list[tuple[str, int, int]] = []
    measured = measure_spikes(
        load_reference_model(model.checkpoint), ids, (), progress=lambda *event: seen.append(event)
    )
    for name, recorded in inputs.items():
        (values,) = recorded
        # transformers ran all rows at once, we in batches: float32 rounding of two layers.
        np.testing.assert_allclose(measured.modules[name].token_amax, values.abs().amax(-1), rtol=1e-4)
        np.testing.assert_allclose(measured.modules[name].channel_amax, values.abs().amax((0, 1)), rtol=1e-4)
    assert seen[-1] == ("windows", 300, 300)
    assert len(seen) == len(batches(ids))


def test_batches_hold_every_window_once() -> None:
    ids = tokens(rows=10, length=500)
    assert [len(batch) for batch in batches(ids)] == [2, 2, 2, 2, 2]
    np.testing.assert_array_equal(np.concatenate(batches(ids)), ids)
    assert [len(batch) for batch in batches(tokens(rows=2, length=5000))] == [1, 1]  # never empty


def integer_linear(
    inputs: NDArray[np.float32], weight: NDArray[np.float32], scale: float, per_channel: bool
) -> NDArray[np.float64]:
    """Return x·Wᵀ in INT8: quantize both, multiply as integers, scale at the end."""
    quantized = np.clip(np.rint(inputs / np.float32(scale)), -128, 127).astype(np.int64)
    amax = np.abs(weight).max(axis=1, keepdims=True) if per_channel else np.abs(weight).max(keepdims=True)
    step = (amax / np.float32(127)).astype(np.float32)
    weights = np.rint(weight / step).astype(np.int64)
    return (quantized @ weights.T).astype(np.float64) * scale * step[:, 0].astype(np.float64)


@pytest.mark.parametrize("scheme", ["int8-per-channel", "int8-per-tensor"])
@pytest.mark.parametrize("name", ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"])
def test_a_simulated_linear_is_integer_arithmetic(scheme: WeightScheme, name: str) -> None:
    model = load_reference_model(tiny_llama().checkpoint)
    linear, scale = model.linear(name), float(np.float32(0.0173))
    random = np.random.default_rng(0)
    inputs = random.normal(size=(2, 30, linear.in_features)).astype(np.float32)  # ±2.2 fits, so some saturate
    assert (np.abs(inputs) > 128 * scale).any()
    weights = QuantizedWeights(model, scheme)
    with simulated(model, {name: scale}, weights):
        actual = linear(torch.from_numpy(inputs)).numpy()
    weight = linear.weight.numpy()
    expected = integer_linear(inputs, weight, scale, scheme == "int8-per-channel")
    # Two dequantizing products and a float32 sum of K terms, each rounding at most 2^-24 of the terms' magnitudes.
    terms = np.minimum(np.abs(inputs), 128 * scale).sum(-1, keepdims=True) * np.abs(weight).max()
    tolerance = (linear.in_features + 4) * 2.0**-24 * terms
    assert (np.abs(actual - expected) <= tolerance).all()
    # Must fail: the unquantized product, and a scale that is one percent off.
    for wrong in (inputs @ weight.T, integer_linear(inputs, weight, 1.01 * scale, scheme == "int8-per-channel")):
        assert not (np.abs(wrong - expected) <= tolerance).all()


def test_a_bias_is_added_after_quantization() -> None:
    model = load_reference_model(tiny_llama(biases=True).checkpoint)
    name = "model.layers.0.mlp.up_proj"
    linear = model.linear(name)
    assert linear.bias.abs().max() > 0
    with simulated(model, {name: 0.01}, QuantizedWeights(model, "int8-per-channel")):
        actual = linear(torch.zeros(1, 1, linear.in_features))
    assert torch.equal(actual[0, 0], linear.bias)


def test_fake_quantize_by_hand() -> None:
    values = torch.tensor([0.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.6, 300.0, -300.0]) * 0.25
    expected = [0, 0, 2, 2, 0, -2, 127, 127, -128]  # half to even; saturated as QuantizeLinear does
    assert (fake_quantize(values, 0.25) / 0.25).tolist() == expected


@pytest.mark.parametrize("fails", [False, True])
def test_simulation_leaves_the_model_as_it_was(fails: bool) -> None:
    model = load_reference_model(tiny_llama(biases=True).checkpoint)
    weights = QuantizedWeights(model, "int8-per-channel")
    before = model.logits(model.hidden_states(tokens()))
    parameters = {name: value.clone() for name, value in model.causal_lm.named_parameters()}

    def run() -> None:
        with simulated(model, dict.fromkeys(linears(2), 0.02), weights):
            inside = model.logits(model.hidden_states(tokens()))
            assert not torch.equal(inside, before)
            if fails:
                raise KeyError

    if fails:
        with pytest.raises(KeyError):
            run()
    else:
        run()
    assert torch.equal(model.logits(model.hidden_states(tokens())), before)
    for name, value in model.causal_lm.named_parameters():
        assert torch.equal(value, parameters[name])
    assert not any("forward" in vars(module) for module in model.causal_lm.modules())


def test_only_the_named_linears_are_quantized() -> None:
    model = load_reference_model(tiny_llama().checkpoint)
    last = "model.layers.1.mlp.down_proj"
    plain = measure_spikes(model, tokens())
    with simulated(model, {last: 0.05}, QuantizedWeights(model, "int8-per-channel")):
        changed = measure_spikes(model, tokens())
    # Nothing lies behind it, so every recorded input is the same.
    for name, spikes in plain.modules.items():
        np.testing.assert_array_equal(changed.modules[name].token_amax, spikes.token_amax)


def plain_perplexity(model: TinyModel, fed: NDArray[np.int64], content: int) -> float:
    """Return the perplexity by torch's own loss on transformers' logits: all content tokens but the first."""
    with torch.inference_mode():
        logits = model.reference(torch.from_numpy(fed)).logits.double()
    scored = content - 1
    targets = torch.from_numpy(fed[:, -scored:])
    return math.exp(torch.nn.functional.cross_entropy(logits[:, -scored - 1 : -1].flatten(0, 1), targets.flatten()))


@pytest.mark.parametrize("length", [2, 20, 300])
def test_perplexity_is_torchs_cross_entropy(length: int) -> None:
    model = tiny_llama(max_positions=512)
    content = tokens(rows=9, length=length)
    fed = with_bos(content, 1)
    assert fed.shape == (9, length + 1)
    actual = model_perplexity(load_reference_model(model.checkpoint), fed, length)
    # float32 logits up to 10 on both sides: 1e-5 absolute in the mean loss.
    assert actual == pytest.approx(plain_perplexity(model, fed, length), rel=1e-5)


def test_perplexity_scores_the_same_tokens_behind_a_prefix() -> None:
    model, content = tiny_llama(), tokens(rows=5)
    ours = load_reference_model(model.checkpoint)
    cached = ours.with_prefix(prefix_key_values(model.checkpoint, PREFIX))
    actual = model_perplexity(cached, content, content.shape[1])
    assert actual == pytest.approx(plain_perplexity(model, behind_prefix(content), content.shape[1]), rel=1e-5)
    assert actual != pytest.approx(model_perplexity(ours, content, content.shape[1]), rel=1e-3)


def test_perplexity_of_what_cannot_be_is_infinite() -> None:
    assert Likelihood(1e6, 2).perplexity == math.inf
    assert (Likelihood(1.0, 1) + Likelihood(3.0, 3)).perplexity == math.e


def test_bos_goes_before_each_window_unless_there_is_none() -> None:
    content = tokens(rows=2, length=3)
    assert with_bos(content, 0)[:, 0].tolist() == [0, 0]
    np.testing.assert_array_equal(with_bos(content, 0)[:, 1:], content)
    assert with_bos(content, None) is content


def test_a_prefix_serves_every_row_of_a_batch() -> None:
    model = tiny_llama()
    ours: ReferenceModel = load_reference_model(model.checkpoint)
    ours = ours.with_prefix(prefix_key_values(model.checkpoint, PREFIX))
    together = ours.hidden_states(tokens())
    alone = torch.cat([ours.hidden_states(row[None]) for row in tokens()])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
