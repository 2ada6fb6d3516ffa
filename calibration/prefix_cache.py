"""The key/value cache of a prefix, computed in float32, one decoder layer in memory at a time."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from spike_export.calibration.checkpoint import EMBEDDING, Checkpoint
from spike_export.calibration.reference_model import empty_decoder

KeyValues = list[tuple[NDArray[np.float32], NDArray[np.float32]]]
"""Per layer (key, value), each [kv_heads, prefix tokens, head_dim] float32; keys already rotated (positions 0..)."""


def prefix_key_values(checkpoint: Checkpoint, token_ids: Sequence[int]) -> KeyValues:
    """Run the prefix through the unquantized decoder and return what its attention caches.

    Source: arXiv 2405.14428, "quantization-free prefix": the prefix never meets a quantizer.
    """
    import torch
    from transformers import DynamicCache

    decoder = empty_decoder(checkpoint.config)
    tokens = torch.tensor([list(token_ids)])
    positions = torch.arange(tokens.shape[1])[None]
    cache = DynamicCache()
    with torch.inference_mode():
        hidden = torch.from_numpy(checkpoint.tensor(EMBEDDING)[np.asarray(token_ids)])[None]
        rotation = decoder.rotary_emb(hidden, positions)
        mask = torch.full((1, 1, tokens.shape[1], tokens.shape[1]), float("-inf")).triu(1)
        for index, layer in enumerate(decoder.layers):
            stem = f"model.layers.{index}."
            layer.load_state_dict(
                {name: torch.from_numpy(checkpoint.tensor(stem + name)) for name in layer.state_dict()}, assign=True
            )
            output = layer(
                hidden,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                position_embeddings=rotation,
            )
            hidden = output[0] if isinstance(output, tuple) else output
            layer.to("meta")
    return [(layer.keys[0].numpy(), layer.values[0].numpy()) for layer in cache.layers]
