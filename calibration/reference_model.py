"""The unquantized model in torch: transformers' own decoder, filled from a checkpoint, forwarded over token windows."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spike_export.calibration.checkpoint import Checkpoint
from spike_export.calibration.decoder_config import DecoderConfig
from spike_export.calibration.heap import return_freed_memory
from spike_export.calibration.modules import representatives

if TYPE_CHECKING:
    import torch
    from torch import nn

    from spike_export.calibration.prefix_cache import KeyValues

BATCH_TOKENS = 1024
"""Tokens per forward call: large enough for fast matrix products, small enough for some hundred MB of activations."""


def hf_config(config: DecoderConfig) -> Any:
    """Return transformers' configuration object."""
    from transformers import AutoConfig

    settings = {key: value for key, value in config.hf.items() if key != "model_type"}
    return AutoConfig.for_model(config.family.model_type, **settings)


def empty_causal_lm(config: DecoderConfig) -> Any:
    """Return transformers' causal LM on the meta device (no memory), its rope tables on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    settings = hf_config(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa", dtype=torch.float32)
    decoder = model.model
    # Rope frequencies are a buffer that no checkpoint holds: made again outside the meta device.
    decoder.rotary_emb = type(decoder.rotary_emb)(settings)
    return model.eval()


def empty_decoder(config: DecoderConfig) -> Any:
    """Return the decoder (embedding, layers, final norm) of `empty_causal_lm`."""
    return empty_causal_lm(config).model


@dataclass(frozen=True)
class ReferenceModel:
    """The model in float32, whole in memory.

    Attributes:
        causal_lm: transformers' model.
        prefix: Key/values that stand before every sequence, or None.
    """

    causal_lm: Any
    prefix: "KeyValues | None" = None

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.causal_lm.model.layers)

    def linear(self, module: str) -> "nn.Linear":
        """Return the torch module of an HF module name."""
        linear: nn.Linear = self.causal_lm.get_submodule(module)
        return linear

    def with_prefix(self, prefix: "KeyValues | None") -> "ReferenceModel":
        """Return the same weights with another prefix."""
        return ReferenceModel(self.causal_lm, prefix)

    def hidden_states(self, tokens: NDArray[np.int64]) -> "torch.Tensor":
        """Forward token windows [batch, length]; return the final norm's output [batch, length, hidden]."""
        import torch

        return_freed_memory()
        with torch.inference_mode():
            output = self.causal_lm.model(
                input_ids=torch.from_numpy(tokens), past_key_values=self._cache(len(tokens)), use_cache=True
            )
        states: torch.Tensor = output.last_hidden_state
        return states

    def logits(self, states: "torch.Tensor") -> "torch.Tensor":
        """Apply the language-model head: [..., hidden] → [..., vocab]."""
        import torch

        with torch.inference_mode():
            logits: torch.Tensor = self.causal_lm.lm_head(states)
        return logits

    def _cache(self, batch: int) -> Any:
        import torch
        from transformers import DynamicCache

        cache = DynamicCache()
        for index, (key, value) in enumerate(self.prefix or ()):
            # A fresh cache for every call: a forward appends to it.
            cache.update(
                torch.from_numpy(key).expand(batch, -1, -1, -1),
                torch.from_numpy(value).expand(batch, -1, -1, -1),
                index,
            )
        return cache

    @contextmanager
    def only_layers(self, count: int) -> Iterator[None]:
        """Within the block, forward through the first `count` decoder layers only."""
        decoder = self.causal_lm.model
        layers = decoder.layers
        decoder.layers = layers[:count]
        try:
            yield
        finally:
            decoder.layers = layers

    @contextmanager
    def observed(self, observe: Any, modules: tuple[str, ...] | None = None) -> Iterator[None]:
        """Within the block, call `observe(module name, input [batch, length, channels])` at each representative."""
        names = representatives(self.num_layers) if modules is None else modules
        handles = [
            self.linear(name).register_forward_pre_hook(lambda _, inputs, name=name: observe(name, inputs[0]))
            for name in names
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def load_reference_model(checkpoint: Checkpoint) -> ReferenceModel:
    """Read all weights as float32 into transformers' model."""
    import torch

    model = empty_causal_lm(checkpoint.config)
    names = [name for name in model.state_dict() if name in checkpoint.tensors.shapes]
    model.load_state_dict(
        {name: torch.from_numpy(checkpoint.tensor(name)) for name in names}, assign=True, strict=False
    )
    if checkpoint.config.tie_word_embeddings:
        stored = model.lm_head if "lm_head.weight" in names else model.model.embed_tokens
        model.lm_head.weight = model.model.embed_tokens.weight = stored.weight
    return ReferenceModel(model.requires_grad_(False))


def batches(windows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Split [samples, length] windows into forward batches of about `BATCH_TOKENS` tokens."""
    size = max(1, BATCH_TOKENS // max(1, windows.shape[1]))
    return [windows[start : start + size] for start in range(0, len(windows), size)]
