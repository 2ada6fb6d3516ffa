"""The decoder that runs layer by layer: however it is run it computes the same, behind a prefix too."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import DynamicCache

from spike_export.calibration.decoder.activations import Activations
from spike_export.calibration.decoder.layerwise import BATCH_TOKENS, Decoder, Execution, batches
from spike_export.calibration.statistics.measure import Recorder, measure_spikes
from spike_export.calibration.statistics.spikes import ModuleSpikes, SpikeStatistics
from spike_export.checkpoint.modules import representatives, siblings
from tests.support.cached_forward import cached_forward
from tests.support.decoder_logits import largest_difference, logits, whole_logits
from tests.support.tiny.families import (
    MIXTURES,
    NAMES,
    PLAIN_CAUSAL,
    WINDOW,
    prefix_masks,
    tiny_family,
    tokens,
)
from tests.support.tiny.models import TinyModel

pytestmark = pytest.mark.usefixtures("one_thread")

PREFIX = (1, 7, 42)

EXECUTIONS = {
    "streamed": Execution(resident=False),
    "spilled": Execution(activation_bytes=0),
    "streamed and spilled": Execution(resident=False, activation_bytes=0),
    "two devices": Execution(devices=("cpu", "cpu")),
}


def behind(ids: NDArray[np.int64], prefix: tuple[int, ...] = PREFIX) -> NDArray[np.int64]:
    return np.concatenate([np.tile(prefix, (len(ids), 1)), ids], axis=1)


@pytest.mark.parametrize("execution", EXECUTIONS.values(), ids=EXECUTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_no_execution_changes_a_bit(name: str, execution: Execution) -> None:
    model, ids = tiny_family(name), tokens(rows=5)
    for prefix in ((), PREFIX):
        expected = logits(Decoder(model.checkpoint), ids, prefix, batch_tokens=48)
        assert torch.equal(logits(Decoder(model.checkpoint, execution), ids, prefix, batch_tokens=48), expected)


def test_a_longer_run_leaves_no_trace_in_dynamic_rope() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    model = tiny_family("llama", rope_parameters=rope, max_position_embeddings=12)
    decoder, ids = Decoder(model.checkpoint), tokens(length=24)
    # Beyond the model's length as both are, transformers would go on with the longer one's frequencies.
    first = logits(decoder, ids[:, :16])
    longer = logits(decoder, ids)[:, :16]
    assert largest_difference(longer, first) > 1e-3
    assert torch.equal(logits(decoder, ids[:, :16]), first)


def test_a_second_run_is_the_first_and_a_prefix_does_not_grow() -> None:
    decoder, ids = Decoder(tiny_family("llama").checkpoint), tokens()
    first = logits(decoder, ids, PREFIX)
    logits(decoder, ids)
    assert torch.equal(logits(decoder, ids, PREFIX), first)


@pytest.mark.parametrize("name", NAMES)
def test_every_token_sees_the_prefix_and_else_its_window(name: str) -> None:
    model, ids = tiny_family(name, attention="eager"), tokens()
    assert ids.shape[1] > 2 * WINDOW
    mask = prefix_masks(model, len(PREFIX), ids.shape[1])
    expected = whole_logits(model.reference, behind(ids), attention_mask=mask)[:, len(PREFIX) :]
    decoder = Decoder(model.checkpoint)
    for batch_tokens in (1, BATCH_TOKENS):
        assert largest_difference(logits(decoder, ids, PREFIX, batch_tokens), expected) < 1e-5
    # Must fail: another prefix, none, and (where there is a window) one that the window leaves behind.
    assert largest_difference(logits(decoder, ids, PREFIX[::-1]), expected) > 1e-3
    assert largest_difference(logits(decoder, ids), expected) > 1e-3
    ordinary = whole_logits(model.reference, behind(ids))[:, len(PREFIX) :]
    assert (largest_difference(ordinary, expected) > 1e-3) == (name not in PLAIN_CAUSAL)


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_windows_of_a_token_or_two_see_the_prefix_and_themselves(name: str, length: int) -> None:
    # For a single token transformers makes no mask at all.
    model, ids = tiny_family(name, attention="eager"), tokens(length=length)
    expected = whole_logits(model.reference, behind(ids))[:, len(PREFIX) :]
    assert largest_difference(logits(Decoder(model.checkpoint), ids, PREFIX), expected) < 1e-5


@pytest.mark.parametrize("name", PLAIN_CAUSAL)
def test_a_prefix_equals_the_same_tokens_before_the_window(name: str) -> None:
    model, ids = tiny_family(name), tokens()
    expected = whole_logits(model.reference, behind(ids))[:, len(PREFIX) :]
    assert largest_difference(logits(Decoder(model.checkpoint), ids, PREFIX), expected) < 1e-5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("resident", [True, False])
def test_key_values_are_transformers_own_cache(name: str, resident: bool) -> None:
    model = tiny_family(name)
    cache = DynamicCache()
    with torch.inference_mode():
        cached_forward(model.reference, torch.tensor([PREFIX]), cache)
    ours = Decoder(model.checkpoint, Execution(resident=resident)).prefix_key_values(PREFIX)
    assert len(ours) == len(cache.layers) == 4
    config = model.checkpoint.config
    for (key, value), layer in zip(ours, cache.layers, strict=True):
        assert key.shape == value.shape == (config.num_key_value_heads, len(PREFIX), config.head_dim)
        np.testing.assert_allclose(key, layer.keys[0].numpy(), rtol=0, atol=1e-5)
        np.testing.assert_allclose(value, layer.values[0].numpy(), rtol=0, atol=1e-5)


def whole_model_statistics(model: TinyModel, ids: NDArray[np.int64]) -> SpikeStatistics:
    """Return what hooks on transformers' own model see, one window at a time."""
    names = representatives(model.checkpoint.config)
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    outputs: dict[str, list[torch.Tensor]] = {linear: [] for name in names for linear in siblings(name)}
    hidden: dict[int, list[torch.Tensor]] = {index: [] for index in range(len(model.reference.model.layers))}

    def note_input(name: str) -> Any:
        return lambda _, arguments: inputs[name].append(arguments[0][0])

    def note_output(found: list[torch.Tensor]) -> Any:
        return lambda _, __, output: found.append((output[0] if isinstance(output, tuple) else output)[0])

    handles = [model.reference.get_submodule(name).register_forward_pre_hook(note_input(name)) for name in inputs]
    handles += [
        model.reference.get_submodule(name).register_forward_hook(note_output(outputs[name])) for name in outputs
    ]
    layers = model.reference.model.layers
    handles += [layers[index].register_forward_hook(note_output(hidden[index])) for index in hidden]
    for row in ids:
        whole_logits(model.reference, row[None])
    for handle in handles:
        handle.remove()

    def amax(found: list[torch.Tensor], *axes: int) -> Any:
        return np.stack([each.abs().amax(axes).numpy() for each in found])

    modules = {
        name: ModuleSpikes(
            amax(inputs[name], 1),
            amax(inputs[name], 0),
            # Only what writes the residual stream is recorded.
            np.max([amax(outputs[linear], 0, 1) for linear in siblings(name)], axis=0)
            * np.float32(name.endswith(("o_proj", "down_proj"))),
        )
        for name in names
    }
    return SpikeStatistics(modules, ids, hidden_amax=np.stack([amax(each, 0, 1) for each in hidden.values()], axis=1))


def assert_same_statistics(actual: SpikeStatistics, expected: SpikeStatistics, rtol: float = 0.0) -> None:
    assert list(actual.modules) == list(expected.modules)
    for name, spikes in expected.modules.items():
        for array in ("token_amax", "sample_channel_amax", "output_amax"):
            np.testing.assert_allclose(
                getattr(actual.modules[name], array), getattr(spikes, array), rtol=rtol, atol=0, err_msg=name
            )
    np.testing.assert_allclose(actual.hidden_amax, expected.hidden_amax, rtol=rtol, atol=0)
    np.testing.assert_array_equal(actual.token_ids, expected.token_ids)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in MIXTURES])
def test_statistics_are_those_of_hooks_on_the_whole_model(name: str) -> None:
    model, ids = tiny_family(name), tokens()
    expected = whole_model_statistics(model, ids)
    assert len(expected.modules) == 16
    assert_same_statistics(measure_spikes(Decoder(model.checkpoint), ids), expected, rtol=0.0)


@pytest.mark.parametrize("execution", EXECUTIONS.values(), ids=EXECUTIONS)
@pytest.mark.parametrize("name", ["mistral", "mixtral"])
def test_no_execution_changes_a_statistic(name: str, execution: Execution) -> None:
    model, ids = tiny_family(name), tokens(rows=5)
    expected = measure_spikes(Decoder(model.checkpoint), ids, PREFIX)
    actual = measure_spikes(Decoder(model.checkpoint, execution), ids, PREFIX)
    assert_same_statistics(actual, expected)
    for block, operands in expected.operand_amax.items():
        np.testing.assert_array_equal(actual.operand_amax[block], operands)


def test_fewer_layers_change_nothing_before_them() -> None:
    decoder, ids = Decoder(tiny_family("llama").checkpoint), tokens()
    whole = measure_spikes(decoder, ids)
    seen: list[tuple[str, int, int]] = []
    early = measure_spikes(decoder, ids, layers=2, progress=lambda *event: seen.append(event))
    assert list(early.modules) == list(representatives(decoder.config))[:8]
    assert early.hidden_amax.shape == (3, 2)
    for name, spikes in early.modules.items():
        np.testing.assert_array_equal(spikes.token_amax, whole.modules[name].token_amax)
    assert seen == [("layers", 1, 2), ("layers", 2, 2)]


def stored_layers(decoder: Decoder) -> list[int]:
    """Return the layers that hold any weight in memory."""
    return [
        index
        for index, layer in enumerate(decoder.skeleton.layers)
        if any(parameter.device.type != "meta" for parameter in layer.parameters())
    ]


@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma3_text"])
def test_a_streamed_model_holds_one_layer_at_a_time(name: str) -> None:
    decoder = Decoder(tiny_family(name).checkpoint, Execution(resident=False))
    during: list[list[int]] = []

    @contextmanager
    def look(index: int, layer: nn.Module) -> Iterator[None]:
        assert layer is decoder.skeleton.layers[index]
        during.append(stored_layers(decoder))
        yield

    decoder.run(tokens(), PREFIX, visits=(look,))
    assert during == [[0], [1], [2], [3]]
    assert stored_layers(decoder) == []
    assert decoder.skeleton.embed_tokens.weight.device.type == "meta"
    assert decoder._resident == {}


def test_a_resident_model_is_read_once() -> None:
    model = tiny_family("mixtral")
    reads: list[str] = []
    stored: Any = model.checkpoint.tensors

    class Counting:
        shapes = stored.shapes

        def read(self, name: str) -> NDArray[np.float32]:
            reads.append(name)
            tensor: NDArray[np.float32] = stored.read(name)
            return tensor

        def sha256(self) -> str:
            return ""

    decoder = Decoder(replace(model.checkpoint, tensors=Counting()))
    for _ in range(2):
        logits(decoder, tokens(), PREFIX)
    assert sorted(reads) == sorted(stored.tensors)
    assert stored_layers(decoder) == [0, 1, 2, 3]


def test_a_tied_head_is_held_once() -> None:
    # In another precision than the file's, so that each reading would make a tensor of its own.
    decoder = Decoder(tiny_family("llama", tie_word_embeddings=True).checkpoint, Execution(dtype="bfloat16"))
    logits(decoder, tokens())
    assert decoder.head()._weight.data_ptr() == decoder.skeleton.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("execution", [Execution(), Execution(resident=False)])
def test_a_failure_inside_a_visit_leaves_the_model_whole(execution: Execution) -> None:
    decoder, ids = Decoder(tiny_family("llama").checkpoint, execution), tokens()
    before = logits(decoder, ids)
    recorder = Recorder(decoder)

    @contextmanager
    def fail(index: int, layer: nn.Module) -> Iterator[None]:
        if index == 2:
            raise ZeroDivisionError
        yield

    with pytest.raises(ZeroDivisionError):
        decoder.run(ids, visits=(recorder.visit, fail))
    layers = decoder.skeleton.layers
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in layers.modules())
    assert not any(getattr(layer.self_attn, "operands", None) for layer in layers)
    assert stored_layers(decoder) == ([0, 1, 2, 3] if execution.resident else [])
    assert torch.equal(logits(decoder, ids), before)


def test_batches_hold_every_window_once() -> None:
    ids = tokens(rows=10, length=500)
    assert [len(batch) for batch in batches(ids)] == [2, 2, 2, 2, 2]
    np.testing.assert_array_equal(np.concatenate(batches(ids)), ids)
    assert [len(batch) for batch in batches(tokens(rows=2, length=5000))] == [1, 1]  # never empty
    assert [len(batch) for batch in batches(tokens(rows=3), 1)] == [1, 1, 1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_activations_come_back_as_they_were_put(dtype: Any) -> None:
    shapes = [(2, 5, 3), (2, 5, 3), (1, 5, 3)]
    kind: torch.dtype = getattr(torch, dtype)
    values = [torch.randn(shape).to(kind) for shape in shapes]
    total = sum(value.numel() * value.element_size() for value in values)
    for limit, spilled in ((total, False), (total - 1, True)):
        held = Activations.allocate(shapes, dtype, limit, None)
        assert held.spilled == spilled
        for index in (2, 0, 1):  # as several devices would
            held.put(index, values[index])
        for index, value in enumerate(values):
            assert torch.equal(held.get(index), value)
            assert held.get(index).dtype == kind
