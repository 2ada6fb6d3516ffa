"""Steps of an INT8 cache: they cover what transformers' own cache holds, with some room, and not much more."""

import numpy as np
import pytest
import torch

from spike_export.calibration.corpus.token_windows import TokenWindows
from spike_export.calibration.decoder.kv_cache import cache_steps
from spike_export.calibration.methods.context import NO_TRANSFORM, Calibration
from spike_export.calibration.methods.kv_cache_steps import HEADROOM, WINDOWS, kv_cache_plans
from spike_export.calibration.methods.options import CalibrationOptions
from tests.support.tiny.families import tiny_family, tokens

PREFIX = (0, 9)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_they_cover_keys_behind_the_rope_and_values_of_the_prefix_too(name: str) -> None:
    model, content = tiny_family(name), tokens(rows=WINDOWS, length=12)
    config = model.checkpoint.config
    options = CalibrationOptions(samples=WINDOWS, length=13, kv_cache_dtype="int8")
    calibration = Calibration(model.checkpoint, TokenWindows(content, content), options)
    plans = kv_cache_plans(calibration, NO_TRANSFORM, PREFIX)
    assert list(plans) == [f"model.layers.{index}.self_attn" for index in range(config.num_hidden_layers)]
    whole = np.concatenate([np.tile(PREFIX, (WINDOWS, 1)), content], axis=1)
    with torch.inference_mode():
        held = model.reference(torch.from_numpy(whole), use_cache=True).past_key_values
    for layer, (block, plan) in zip(held.layers, plans.items(), strict=True):
        steps = cache_steps(block, plan, config.num_key_value_heads, config.head_dim)
        for states, found in ((layer.keys, steps.key), (layer.values, steps.value)):
            needed = states.abs().amax((0, 2)).numpy()[:, None] / 127
            # Each is the next larger power, at most 2 ** (1 / 8) too large; both sides compute in float32.
            assert (found > HEADROOM * needed * (1 - 1e-4)).all()
            assert (found < HEADROOM * needed * 2 ** (1 / 8) * (1 + 1e-4)).all()


def test_without_the_option_nothing_is_run() -> None:
    model, content = tiny_family("llama"), tokens(rows=2, length=12)
    calibration = Calibration(model.checkpoint, TokenWindows(content, content), CalibrationOptions())
    assert kv_cache_plans(calibration, NO_TRANSFORM, PREFIX) == {}
    assert "model" not in calibration.__dict__
