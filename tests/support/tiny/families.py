"""A small random model of every family: transformers' own, and the checkpoint that calibration reads."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM

from spike_export.checkpoint.checkpoint import LM_HEAD, Checkpoint
from spike_export.checkpoint.decoder_config import decoder_config
from spike_export.checkpoint.families import Experts
from tests.support.tiny.models import MemoryTensors, TinyModel

WINDOW = 9
"""Sliding window of the families that have one: shorter than the token windows of the tests."""

_EAGER_ONLY = ("gemma2",)
"""transformers' fused kernels lack the soft cap."""

_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "mixtral": {"sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 12},
    "gemma": {},
    "gemma2": {"sliding_window": WINDOW, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": WINDOW, "query_pre_attn_scalar": 16, "sliding_window_pattern": 2},
    "granite": {
        "head_dim": None,
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.15,
        "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
    },
    "olmo2": {"head_dim": None},
    "qwen2": {"head_dim": None, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "qwen3": {},
    "qwen3_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "norm_topk_prob": False,
        "use_sliding_window": False,
    },
    "phi3": {"sliding_window": WINDOW, "head_dim": None},
}

NAMES = tuple(_SETTINGS)

MIXTURES = ("mixtral", "qwen3_moe")
"""Families with experts."""

PLAIN_CAUSAL = ("llama", "gemma", "granite", "olmo2", "qwen3", "qwen3_moe")
"""Families without a sliding window."""


def tiny_family(name: str, *, attention: str | None = None, seed: int = 0, **changes: Any) -> TinyModel:
    """GQA 4/2, hidden 48, four layers; gains and biases are random too, so that forgetting one shows.

    Args:
        name: HF's `model_type`.
        attention: transformers' attention; by default the fused one, where the family can use it.
        seed: Of the weights.
        changes: To the configuration; None removes a key.
    """
    settings: dict[str, Any] = {
        "vocab_size": 99,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "initializer_range": 0.15,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
        **_SETTINGS[name],
        **changes,
    }
    kept = {key: value for key, value in settings.items() if value is not None or key == "pad_token_id"}
    attention = attention or ("eager" if name in _EAGER_ONLY else "sdpa")
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name, **kept, attn_implementation=attention)
    # The reference's own loop over experts: its batched kernels sum up in another order.
    reference = AutoModelForCausalLM.from_config(config, attn_implementation=attention, experts_implementation="eager")
    reference.eval().requires_grad_(False)
    for parameter_name, parameter in reference.named_parameters():
        if parameter_name.endswith("bias") or "norm" in parameter_name:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return TinyModel(reference, checkpoint_of(reference))


def checkpoint_of(reference: Any) -> Checkpoint:
    """Return the checkpoint of transformers' model, under the names that its files have."""
    config = decoder_config(reference.config.to_dict(), "tiny")
    tensors: dict[str, NDArray[np.float32]] = {}
    for name, tensor in reference.state_dict().items():
        tensors |= (
            dict(_stored(name, tensor, config.family.experts)) if config.family.experts else {name: tensor.numpy()}
        )
    if config.tie_word_embeddings:
        tensors.pop(LM_HEAD, None)
    return Checkpoint("tiny", config, MemoryTensors(tensors), None, {})


def _stored(name: str, tensor: torch.Tensor, names: Experts) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Name a mixture's tensors as its files do: transformers stacks the experts, and gate on up."""
    layer, is_moe, rest = name.partition(".mlp.")
    stem = f"{layer}.{names.block}"
    if not is_moe:
        yield name, tensor.numpy()
    elif rest == "gate.weight":
        yield f"{stem}.gate.weight", tensor.numpy()
    else:
        for expert, matrix in enumerate(tensor.numpy()):
            place = f"{stem}.experts.{expert}"
            if rest == "experts.down_proj":
                yield f"{place}.{names.down}.weight", matrix
            else:
                half = len(matrix) // 2
                yield f"{place}.{names.gate}.weight", matrix[:half]
                yield f"{place}.{names.up}.weight", matrix[half:]


def replaced(checkpoint: Checkpoint, changes: Mapping[str, NDArray[np.float32]]) -> Checkpoint:
    """Return the checkpoint with some tensors replaced."""
    stored: Any = checkpoint.tensors
    unknown = changes.keys() - stored.tensors.keys()
    assert not unknown, unknown
    return replace(checkpoint, tensors=MemoryTensors({**stored.tensors, **changes}))


def with_unreached_expert(checkpoint: Checkpoint, layer: int) -> Checkpoint:
    """Return a Mixtral that gives each token one of four experts, and none to a layer's last."""
    name = f"model.layers.{layer}.block_sparse_moe.gate.weight"
    router = checkpoint.tensor(name).copy()
    router[1] = -router[0]
    router[3] = 0  # never above both of two opposite logits
    return replaced(checkpoint, {name: router})


def tokens(rows: int = 3, length: int = 24, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(3, 99, (rows, length))


def prefix_masks(model: TinyModel, prefix: int, length: int) -> Any:
    """Return the additive masks by hand: causal, inside the window where a layer has one; the prefix always seen."""
    query, key = np.arange(prefix + length)[:, None], np.arange(prefix + length)[None, :]
    window = model.checkpoint.config.sliding_window or prefix + length
    near = (query - key < window) | (key < prefix)
    full, sliding = (
        torch.from_numpy(np.where((key <= query) & seen, 0.0, -np.inf).astype(np.float32))[None, None]
        for seen in (np.full_like(near, True), near)
    )
    config = model.reference.config
    if getattr(config, "layer_types", None) and config.model_type in ("gemma2", "gemma3_text", "qwen2", "qwen3"):
        return {"full_attention": full, "sliding_attention": sliding}
    return sliding if model.checkpoint.config.sliding_window else full
