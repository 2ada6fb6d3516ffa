"""Cosine and sine tables of the rotary embedding, one row per position."""

import numpy as np
from numpy.typing import NDArray

from spike_export.calibration.decoder_config import DecoderConfig


def rope_tables(config: DecoderConfig, positions: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return cos and sin, each [positions, head_dim / 2] float32.

    Computed by transformers' own rotary module, so that llama3 and linear scaling are exactly the reference's.
    The module of LLaMA serves Mistral too: both read `rope_parameters` alike.
    """
    import torch
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    settings = {key: value for key, value in config.hf.items() if key != "model_type"}
    rotary = LlamaRotaryEmbedding(AutoConfig.for_model(config.family.model_type, **settings))
    with torch.inference_mode():
        cos, sin = rotary(torch.zeros(1), torch.arange(positions)[None])
    # HF repeats the frequencies for both halves of a head; the ONNX operator wants them once.
    half = config.head_dim // 2
    cos, sin = (np.ascontiguousarray(table[0, :, :half].numpy(), np.float32) for table in (cos, sin))
    return cos, sin
