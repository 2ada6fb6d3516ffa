"""The simulation against integer arithmetic and attention written out, in every scheme."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from spike_export.artifacts.recipe import AttentionPlan, KvCachePlan, ModulePlan, WeightScheme
from spike_export.calibration.decoder.exponents import encode_exponents
from spike_export.calibration.decoder.layerwise import Decoder, Execution, batches
from spike_export.calibration.decoder.simulate import (
    SMALLEST_TOKEN_AMAX,
    QuantizedWeights,
    Simulation,
    fake_quantize,
    fake_quantize_tokens,
)
from spike_export.calibration.statistics.measure import Recorder, measure_spikes
from spike_export.checkpoint.modules import linears, split_name
from tests.support.tiny.families import tiny_family, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

PER_CHANNEL: WeightScheme = "int8-per-channel"
STATIC = ModulePlan(precision="int8", activation_scale=float(np.float32(0.0173)))
PER_TOKEN = ModulePlan(precision="int8", activations="per-token")
WEIGHT_ONLY = ModulePlan(precision="float16", weights="int8")
KEPT = ModulePlan(precision="float16")
PREFIX = (1, 7, 42)


def quantized_input(inputs: Floats, plan: ModulePlan) -> tuple[Doubles, Doubles]:
    """Return (what the product multiplies, its step); W8A16 multiplies the input itself."""
    if plan.precision != "int8":
        return inputs.astype(np.float64), np.ones((1,) * inputs.ndim)
    if plan.activation_scale is not None:
        step = np.full((1,) * inputs.ndim, np.float32(plan.activation_scale))
    else:
        step = (np.abs(inputs).max(axis=-1, keepdims=True) / np.float32(127)).astype(np.float32)
    return np.clip(np.rint(inputs / step), -128, 127).astype(np.float64), step.astype(np.float64)


def integer_linear(inputs: Floats, weight: Floats, plan: ModulePlan, scheme: WeightScheme = PER_CHANNEL) -> Doubles:
    """Return x W^T: quantize both, multiply whole numbers, scale at the end."""
    values, step = quantized_input(inputs, plan)
    amax = np.abs(weight).max(axis=1, keepdims=True) if scheme == PER_CHANNEL else np.abs(weight).max(keepdims=True)
    weight_step = (amax / np.float32(127)).astype(np.float32)
    weights = np.rint(weight / weight_step).astype(np.float64)
    return np.asarray(values @ weights.T * step * weight_step[:, 0].astype(np.float64))


@contextmanager
def inside(decoder: Decoder, simulation: Simulation, index: int) -> Iterator[nn.Module]:
    """Within the block, one layer under simulation."""
    with torch.inference_mode(), decoder.layer(index) as layer, simulation.visit(index, layer):
        yield layer


@pytest.mark.parametrize("plan", [STATIC, PER_TOKEN, WEIGHT_ONLY], ids=["static", "per-token", "W8A16"])
@pytest.mark.parametrize("scheme", ["int8-per-channel", "int8-per-tensor"])
@pytest.mark.parametrize("name", ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"])
def test_a_simulated_linear_is_integer_arithmetic(name: str, scheme: WeightScheme, plan: ModulePlan) -> None:
    checkpoint = tiny_family("llama").checkpoint
    index, inner = split_name(name)
    weight = checkpoint.tensor(f"{name}.weight")
    spread = np.array([1, 0.01, 100], np.float32)[:, None, None]  # tokens of very different magnitude
    inputs = (np.random.default_rng(0).normal(size=(3, 30, weight.shape[1])) * spread).astype(np.float32)
    with inside(Decoder(checkpoint), Simulation({name: plan}, QuantizedWeights(scheme)), index) as layer:
        actual = layer.get_submodule(inner)(torch.from_numpy(inputs)).numpy()
    expected = integer_linear(inputs, weight, plan, scheme)
    # Dequantizing and a float32 sum of K terms: each rounds at most 2^-24 of the terms' magnitudes.
    values, step = quantized_input(inputs, plan)
    terms = np.abs(values * step).sum(-1, keepdims=True) * np.abs(weight).max()
    tolerance = (weight.shape[1] + 4) * 2.0**-24 * terms
    assert (np.abs(actual - expected) <= tolerance).all()
    # Must fail: the unquantized product, and every other plan.
    wrong = [inputs @ weight.T]
    wrong += [
        integer_linear(inputs, weight, other, scheme) for other in (STATIC, PER_TOKEN, WEIGHT_ONLY) if other != plan
    ]
    for other in wrong:
        assert not (np.abs(other - expected) <= tolerance).all()


def test_a_bias_is_added_after_quantization() -> None:
    decoder = Decoder(tiny_family("llama", attention_bias=True, mlp_bias=True).checkpoint)
    name = "model.layers.0.mlp.up_proj"
    for plan in (STATIC, PER_TOKEN, WEIGHT_ONLY):
        with inside(decoder, Simulation({name: plan}, QuantizedWeights(PER_CHANNEL)), 0) as layer:
            linear: Any = layer.get_submodule("mlp.up_proj")
            assert linear.bias.abs().max() > 0
            assert torch.equal(linear(torch.zeros(1, 1, 48))[0, 0], linear.bias)


def test_a_kept_linear_is_left_alone() -> None:
    name = "model.layers.0.mlp.up_proj"
    decoder = Decoder(tiny_family("llama").checkpoint)
    with inside(decoder, Simulation({name: KEPT}, QuantizedWeights(PER_CHANNEL)), 0) as layer:
        assert not any("forward" in vars(module) for module in layer.modules())


def test_fake_quantize_by_hand() -> None:
    values = torch.tensor([0.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.6, 300.0, -300.0]) * 0.25
    expected = [0, 0, 2, 2, 0, -2, 127, 127, -128]  # half to even; saturated as QuantizeLinear does
    assert (fake_quantize(values, 0.25) / 0.25).tolist() == expected
    assert values[7] == 75.0  # what came in is as it was


def test_fake_quantize_of_tokens_by_hand() -> None:
    values = torch.tensor([[127.0, 0.6, -63.4], [0.0, 0.0, 0.0], [1.27, -0.013, 0.004]])
    steps = torch.tensor([[1.0], [SMALLEST_TOKEN_AMAX / 127], [1.27 / 127]])
    rounded = torch.tensor([[127.0, 1.0, -63.0], [0.0, 0.0, 0.0], [127.0, -1.0, 0.0]])
    torch.testing.assert_close(fake_quantize_tokens(values), rounded * steps, rtol=1e-6, atol=0)


def test_kept_weights_are_those_made_anew() -> None:
    checkpoint, ids = tiny_family("mixtral").checkpoint, tokens()
    plans = dict.fromkeys(linears(checkpoint.config), PER_TOKEN)
    kept, anew = QuantizedWeights(PER_CHANNEL), QuantizedWeights(PER_CHANNEL, keep=False)
    found = [
        Decoder(checkpoint, Execution(resident=weights.keep))
        .run(ids, visits=(Simulation(plans, weights).visit,))
        .get(0)
        for weights in (kept, kept, anew)
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert {module for module, _ in kept._known} == set(plans)
    assert anew._known == {}


def test_two_devices_simulate_alike() -> None:
    checkpoint, ids = tiny_family("llama").checkpoint, tokens(rows=5)
    simulation = Simulation(
        dict.fromkeys(linears(checkpoint.config), STATIC),
        QuantizedWeights(PER_CHANNEL),
        {f"model.layers.{layer}.self_attn": AttentionPlan(query=0.02, key=0.03, value=0.01) for layer in range(4)},
    )
    one, two = (
        Decoder(checkpoint, Execution(devices=devices)).run(ids, PREFIX, visits=(simulation.visit,), batch_tokens=1)
        for devices in (("cpu",), ("cpu", "cpu"))
    )
    for index in range(5):
        assert torch.equal(one.get(index), two.get(index))


def test_the_output_has_the_decoders_precision() -> None:
    checkpoint = tiny_family("llama").checkpoint
    decoder = Decoder(checkpoint, Execution(dtype="bfloat16"))
    simulation = Simulation(dict.fromkeys(linears(checkpoint.config), STATIC), QuantizedWeights(PER_CHANNEL))
    states = decoder.run(tokens(), visits=(simulation.visit,)).get(0)
    assert states.dtype == torch.bfloat16
    assert torch.isfinite(states).all()


@pytest.mark.parametrize("fails", [False, True])
def test_simulation_leaves_the_model_as_it_was(fails: bool) -> None:
    decoder, ids = Decoder(tiny_family("llama", attention_bias=True).checkpoint), tokens()
    before = decoder.run(ids).get(0)
    parameters = {name: value.clone() for name, value in decoder.skeleton.named_parameters() if "layers" in name}
    simulation = Simulation(
        dict.fromkeys(linears(decoder.config), STATIC),
        QuantizedWeights(PER_CHANNEL),
        {"model.layers.0.self_attn": AttentionPlan(query=0.1, key=0.1, value=0.1)},
    )

    @contextmanager
    def fail(index: int, layer: nn.Module) -> Iterator[None]:
        assert "forward" in vars(layer.get_submodule("mlp.up_proj"))
        if fails:
            raise KeyError
        yield

    if fails:
        with pytest.raises(KeyError):
            decoder.run(ids, visits=(simulation.visit, fail))
    else:
        assert not torch.equal(decoder.run(ids, visits=(simulation.visit, fail)).get(0), before)
    assert torch.equal(decoder.run(ids).get(0), before)
    for name, value in decoder.skeleton.named_parameters():
        if name in parameters:
            assert torch.equal(value, parameters[name])
    assert not any("forward" in vars(module) for module in decoder.skeleton.layers.modules())
    assert not any(getattr(layer.self_attn, "operands", None) for layer in decoder.skeleton.layers)


def test_only_the_named_linears_are_quantized() -> None:
    decoder, ids = Decoder(tiny_family("llama").checkpoint), tokens()
    last = "model.layers.3.mlp.down_proj"
    coarse = ModulePlan(precision="int8", activation_scale=0.5)
    simulation = Simulation({last: coarse}, QuantizedWeights(PER_CHANNEL))
    inputs: list[torch.Tensor] = []

    @contextmanager
    def look(index: int, layer: nn.Module) -> Iterator[None]:
        handle = layer.get_submodule("mlp.down_proj").register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        yield
        handle.remove()

    plain = decoder.run(ids, visits=(look,)).get(0)
    changed = decoder.run(ids, visits=(simulation.visit, look)).get(0)
    # Nothing lies behind it, so every input is the same, and only the output differs.
    for one, other in zip(inputs[:4], inputs[4:], strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(plain, changed)


def test_a_prefix_is_not_quantized() -> None:
    decoder = Decoder(tiny_family("llama").checkpoint)
    config = decoder.config
    coarse = ModulePlan(precision="int8", activation_scale=1.0)
    simulation = Simulation(dict.fromkeys(linears(config), coarse), QuantizedWeights(PER_CHANNEL))
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    @contextmanager
    def look(index: int, layer: nn.Module) -> Iterator[None]:
        def operands(*states: torch.Tensor) -> tuple[torch.Tensor, ...]:
            seen.append((states[1][:, :, : len(PREFIX)], states[2][:, :, : len(PREFIX)]))
            return states

        attention: Any = layer.get_submodule("self_attn")
        attention.operands = operands
        yield
        attention.operands = None

    decoder.run(tokens(), PREFIX, visits=(simulation.visit, look))
    assert len(seen) == 4
    for (key, value), (expected_key, expected_value) in zip(seen, decoder.prefix_key_values(PREFIX), strict=True):
        for row in range(3):
            np.testing.assert_array_equal(key[row], expected_key)
            np.testing.assert_array_equal(value[row], expected_value)


def step_rounded(states: Doubles, step: float, start: int) -> Doubles:
    rounded = np.clip(np.rint(states / np.float32(step)), -128, 127) * np.float32(step)
    return np.concatenate([states[:, :, :start], rounded[:, :, start:]], axis=2)


def plain_attention(query: Doubles, key: Doubles, value: Doubles, window: int | None, past: int) -> Doubles:
    """Return [samples, tokens, heads * size] by loops over heads and tokens."""
    samples, heads, length, size = query.shape
    mixed = np.zeros((samples, length, heads, size))
    for sample in range(samples):
        for head in range(heads):
            shared = head // (heads // key.shape[1])
            for token in range(length):
                here = past + token
                near = range(past if window is None else max(past, here - window + 1), here + 1)
                seen = [*range(past), *near]
                scores = key[sample, shared, seen] @ query[sample, head, token] / np.sqrt(size)
                shares = np.exp(scores - scores.max())
                mixed[sample, token, head] = shares / shares.sum() @ value[sample, shared, seen]
    return mixed.reshape(samples, length, heads * size)


@pytest.mark.parametrize("prefix", [(), PREFIX])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_attention_multiplies_rounded_operands_and_leaves_the_prefix(name: str, prefix: tuple[int, ...]) -> None:
    checkpoint, ids = tiny_family(name).checkpoint, tokens(rows=2, length=14)
    block = "model.layers.0.self_attn"
    plan = AttentionPlan(query=0.11, key=0.07, value=0.05)
    exact: list[Doubles] = []
    mixed: list[torch.Tensor] = []

    @contextmanager
    def look(index: int, layer: nn.Module) -> Iterator[None]:
        attention: Any = layer.get_submodule("self_attn")
        inner = getattr(attention, "operands", None)

        def operands(*states: torch.Tensor) -> Any:
            exact.extend(each.double().numpy() for each in states)
            return states if inner is None else inner(*states)

        attention.operands = operands
        handle = attention.o_proj.register_forward_pre_hook(lambda _, args: mixed.append(args[0]))
        yield
        handle.remove()
        attention.operands = None

    simulation = Simulation({}, QuantizedWeights(PER_CHANNEL), {block: plan})
    decoder = Decoder(checkpoint)
    decoder.run(ids, prefix, layers=1, visits=(simulation.visit, look))
    query, key, value = exact
    past = len(prefix)
    assert key.shape[2] == past + 14

    def attended(start: int) -> Doubles:
        return plain_attention(
            step_rounded(query, plan.query, 0),
            step_rounded(key, plan.key, start),
            step_rounded(value, plan.value, start),
            checkpoint.config.sliding_window,
            past,
        )

    actual = mixed[0].double().numpy()
    # Rounding of float32 products of size below 10.
    assert np.abs(actual - attended(past)).max() < 1e-5
    # Must fail: nothing rounded, and the prefix rounded too.
    plain = plain_attention(query, key, value, checkpoint.config.sliding_window, past)
    assert np.abs(actual - plain).max() > 1e-3
    if prefix:
        assert np.abs(actual - attended(0)).max() > 1e-3


@pytest.mark.parametrize("prefix_cached", [True, False])
def test_attention_reads_keys_and_values_from_an_int8_cache(prefix_cached: bool) -> None:
    checkpoint, ids = tiny_family("llama").checkpoint, tokens(rows=2, length=14)
    config, random = checkpoint.config, np.random.default_rng(4)
    channels = config.num_key_value_heads * config.head_dim
    exponents = [random.integers(-40, -24, channels).astype(np.int8) for _ in range(2)]
    plan = KvCachePlan(key=encode_exponents(exponents[0]), value=encode_exponents(exponents[1]))
    seen: list[Doubles] = []

    @contextmanager
    def look(index: int, layer: nn.Module) -> Iterator[None]:
        attention: Any = layer.get_submodule("self_attn")
        inner = attention.operands

        def operands(*states: torch.Tensor) -> Any:
            read = inner(*states)
            seen.extend(each.double().numpy() for each in (*states, *read))
            return read

        attention.operands = operands
        yield

    simulation = Simulation(
        {}, QuantizedWeights(PER_CHANNEL), kv_cache={"model.layers.0.self_attn": plan}, prefix_cached=prefix_cached
    )
    Decoder(checkpoint).run(ids, PREFIX, layers=1, visits=(simulation.visit, look))
    assert np.array_equal(seen[0], seen[3])
    for exact, read, powers in zip(seen[1:3], seen[4:], exponents, strict=True):
        steps = np.exp2(powers / 8).reshape(config.num_key_value_heads, 1, config.head_dim)
        expected = np.clip(np.rint(exact / steps), -128, 127) * steps
        if not prefix_cached:
            expected[:, :, : len(PREFIX)] = exact[:, :, : len(PREFIX)]
        # Half a last bit of float32 in the step and in the product; and, rarely, a quotient between two steps.
        apart = np.abs(read - expected) > 1e-6 * np.abs(expected)
        assert apart.mean() < 1e-3
        assert not np.array_equal(read, exact)


def test_a_quantized_expert_computes_in_integers() -> None:
    checkpoint = tiny_family("mixtral").checkpoint
    moe = "model.layers.1.block_sparse_moe"
    plans = {f"{moe}.experts.2.{name}": plan for name, plan in (("w1", STATIC), ("w3", STATIC), ("w2", PER_TOKEN))}
    states = np.random.default_rng(1).normal(size=(2, 20, 48)).astype(np.float32)
    flat = states.reshape(-1, 48)

    def weight(name: str) -> Floats:
        return checkpoint.tensor(f"{moe}.{name}.weight")

    scores = flat.astype(np.float64) @ weight("gate").T.astype(np.float64)
    expected = np.zeros((40, 48))
    chosen_by = 0
    for token in range(40):
        chosen = np.argsort(-scores[token])[:2]
        shares = np.exp(scores[token][chosen] - scores[token].max())
        for expert, share in zip(chosen, shares / shares.sum(), strict=True):
            row, stem = flat[token : token + 1], f"experts.{expert}"
            if expert == 2:
                chosen_by += 1
                gate, up = (integer_linear(row, weight(f"{stem}.{each}"), STATIC) for each in ("w1", "w3"))
                product = (gate / (1 + np.exp(-gate)) * up).astype(np.float32)
                output = integer_linear(product, weight(f"{stem}.w2"), PER_TOKEN)
            else:
                gate, up = (np.asarray(row @ weight(f"{stem}.{each}").T, np.float64) for each in ("w1", "w3"))
                output = gate / (1 + np.exp(-gate)) * up @ weight(f"{stem}.w2").T
            expected[token] += share * output[0]
    assert 5 < chosen_by < 40

    decoder = Decoder(checkpoint)
    with inside(decoder, Simulation(plans, QuantizedWeights(PER_CHANNEL)), 1) as layer:
        actual = layer.get_submodule("block_sparse_moe")(torch.from_numpy(states)).reshape(40, 48).numpy()
    with inside(decoder, Simulation({}, QuantizedWeights(PER_CHANNEL)), 1) as layer:
        plain = layer.get_submodule("block_sparse_moe")(torch.from_numpy(states)).reshape(40, 48).numpy()
    changed = np.abs(plain - expected).max(axis=1) > 1e-4 * np.abs(expected).max()
    assert changed.sum() == chosen_by  # exactly the tokens that the expert was given
    # A product that lies on the edge between two steps may fall to either side: at most one token of 40.
    off = np.abs(actual - expected).max(axis=1) > 1e-4 * np.abs(expected).max()
    assert off.sum() <= 1


def test_statistics_under_simulation_see_quantized_predecessors() -> None:
    decoder, ids = Decoder(tiny_family("llama").checkpoint), tokens()
    first = "model.layers.0.mlp.down_proj"
    plain = measure_spikes(decoder, ids)
    recorder = Recorder(decoder)
    simulation = Simulation({first: ModulePlan(precision="int8", activation_scale=0.5)}, QuantizedWeights(PER_CHANNEL))
    decoder.run(ids, visits=(simulation.visit, recorder.visit), batch_tokens=1)
    under = recorder.statistics(batches(ids, 1), (), np.arange(3))
    same = [
        name
        for name, spikes in plain.modules.items()
        if np.array_equal(spikes.token_amax, under.modules[name].token_amax)
    ]
    assert same == list(plain.modules)[:4]
