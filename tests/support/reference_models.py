"""transformers' own model with the weights of a checkpoint: the reference for real models."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from spike_export.checkpoint.checkpoint import EMBEDDING, LM_HEAD, Checkpoint


def reference_model(checkpoint: Checkpoint) -> Any:
    """Return the model in float32, of whose parameters none is initialized before the checkpoint's take its place."""
    config = AutoConfig.for_model(**{**checkpoint.config.hf, "dtype": "float32"})
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config)
    tensors = {name: torch.from_numpy(checkpoint.tensors.read(name)) for name in checkpoint.tensors.shapes}
    tensors.setdefault(LM_HEAD, tensors[EMBEDDING])
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def most_likely(model: Any, prompt: Sequence[int], continuation: Sequence[int]) -> list[int]:
    """Return the model's most likely token after a prompt, and after each token of a continuation of the prompt.

    Where these begin with the continuation, greedy decoding of the prompt gives the continuation, token by token: one
    forward pass proves it.
    """
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *continuation]])).logits[0, len(prompt) - 1 :]
    return [int(token) for token in logits.argmax(dim=-1)]
