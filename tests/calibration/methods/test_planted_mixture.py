r"""A spike planted in one expert of a mixture: found through the router, kept in 16 bit, and taken away by a prefix."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import MixtralConfig

from spike_export.calibration.corpus.corpus import Corpus
from spike_export.calibration.corpus.token_windows import TokenWindows
from spike_export.calibration.methods.context import NO_TRANSFORM, Calibration
from spike_export.calibration.methods.module_choice import choose_kept
from spike_export.calibration.methods.options import CalibrationOptions
from spike_export.calibration.methods.prefix_choice import PrefixChoice, choose_prefix
from spike_export.calibration.recipe_writer import build_recipe
from spike_export.calibration.statistics.spikes import SpikeStatistics
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.checkpoint.decoder_config import decoder_config
from spike_export.checkpoint.modules import is_router, linears
from tests.support.tiny.checkpoints import (
    BOS,
    PLANTED_CHANNEL,
    PLANTED_LAYER,
    SPIKING_CHARACTER,
    planted_spike_llama,
    sampled_text,
    token_of,
)
from tests.support.tiny.models import MemoryTensors

EXPERTS, PLANTED_EXPERT = 4, 2
PLANTED = f"model.layers.{PLANTED_LAYER}.block_sparse_moe.experts.{PLANTED_EXPERT}.w2"
SPIKING = token_of(SPIKING_CHARACTER)
_IS_SPIKING, _RESERVED = 0, 3


def planted_mixture() -> Checkpoint:
    r"""Turn the planted model's MLPs into experts: one keeps the plant and gets every `\n`, the others are tame."""
    torch.manual_seed(0)
    llama = planted_spike_llama()
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    tensors: dict[str, np.ndarray] = {}
    for name, tensor in llama.state_dict().items():
        if ".mlp." not in name:
            tensors[name] = tensor.numpy()
            continue
        stem, _, leaf = name.partition(".mlp.")
        for expert in range(EXPERTS):
            weight = tensor.clone()
            if expert != PLANTED_EXPERT:
                weight += 0.02 * torch.randn_like(weight)
                if leaf.startswith(("gate", "up")):
                    weight[PLANTED_CHANNEL] = weight[PLANTED_CHANNEL + 1]
                weight[:_RESERVED] = 0 if leaf.startswith("down") else weight[:_RESERVED]
            linear = names[leaf.removesuffix(".weight")]
            tensors[f"{stem}.block_sparse_moe.experts.{expert}.{linear}.weight"] = weight.numpy()
    config = llama.config
    for layer in range(config.num_hidden_layers):
        router = 0.3 * torch.randn(EXPERTS, config.hidden_size)
        router[:, :_RESERVED] = 0
        router[PLANTED_EXPERT, _IS_SPIKING] = 50.0
        tensors[f"model.layers.{layer}.block_sparse_moe.gate.weight"] = router.numpy()
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    more = ("num_key_value_heads", "head_dim", "max_position_embeddings", "bos_token_id", "eos_token_id")
    settings = {key: getattr(config, key) for key in (*same, *more, "rope_parameters", "rms_norm_eps")}
    mixtral = MixtralConfig(**settings, num_local_experts=EXPERTS, num_experts_per_tok=2, sliding_window=None)
    return Checkpoint("planted", decoder_config(mixtral.to_dict(), "planted"), MemoryTensors(tensors), None, {})


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    tokens = sampled_text(planted_spike_llama())[:20]
    options = CalibrationOptions(samples=16, length=49, smoothing=False, max_fp16_modules=1, prefix_length=3)
    return Calibration(planted_mixture(), TokenWindows(tokens[:16], tokens[16:]), options)


@pytest.fixture(scope="module")
def plain(calibration: Calibration) -> SpikeStatistics:
    return calibration.measure(())


@pytest.fixture(scope="module")
def prefixes(calibration: Calibration, plain: SpikeStatistics) -> PrefixChoice:
    return choose_prefix(calibration, plain)


def test_the_expert_is_found_with_its_token_and_place(plain: SpikeStatistics) -> None:
    ratios = plain.ratios()
    (worst, ratio), (_, second) = list(ratios.items())[:2]
    assert worst == PLANTED
    assert ratio > 30 * second
    top = plain.top_tokens(PLANTED, 1)[0]
    first = int(np.flatnonzero(plain.token_ids[top.sample] == SPIKING)[0])
    assert (top.token_id, top.position) == (SPIKING, first)
    # Every `\n` came here, and nothing is recorded of the tokens that did not.
    seen = ~np.isnan(plain.modules[PLANTED].token_amax)
    assert seen[plain.token_ids == SPIKING].all()
    assert not seen.all()


def test_the_expert_is_excluded_and_no_router_is_quantized(calibration: Calibration, plain: SpikeStatistics) -> None:
    choice = choose_kept(calibration, plain, NO_TRANSFORM)
    recipe = build_recipe(calibration, Corpus("planted", ("text",)), plain, choice)
    assert recipe.kept_linears() == (PLANTED,)
    routers = [name for name in linears(calibration.checkpoint.config) if is_router(name)]
    assert len(routers) == calibration.checkpoint.config.num_hidden_layers
    assert {recipe.modules[name].precision for name in routers} == {"float32"}
    assert {recipe.modules[name].reason for name in routers} == {"router"}


def test_a_prefix_takes_the_spike(calibration: Calibration, plain: SpikeStatistics, prefixes: PrefixChoice) -> None:
    assert prefixes.token_ids[0] == BOS
    assert SPIKING in prefixes.token_ids
    behind = calibration.measure(prefixes.token_ids)
    assert behind.modules[PLANTED].ratio < plain.modules[PLANTED].ratio / 30
    # Must fail: a prefix without the token.
    control = calibration.measure((BOS, token_of("a"), token_of("b")))
    assert control.modules[PLANTED].ratio > plain.modules[PLANTED].ratio / 3


def test_the_quantized_mixture_is_cured(
    calibration: Calibration, plain: SpikeStatistics, prefixes: PrefixChoice
) -> None:
    paper = calibration.with_options(replace(calibration.options, activation_range="max"))
    spoilt = paper.predicted(plain, (), NO_TRANSFORM).divergence
    kept = paper.predicted(plain, (PLANTED,), NO_TRANSFORM).divergence
    behind = paper.predicted(calibration.measure(prefixes.token_ids), (), NO_TRANSFORM).divergence
    assert kept < spoilt / 3
    assert behind < spoilt / 3
