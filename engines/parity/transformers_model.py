"""transformers' own model with a checkpoint's weights, behind a prefix that every token sees."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from spike_export.calibration.decoder.layers.attention import visible
from spike_export.checkpoint.checkpoint import EMBEDDING, LM_HEAD, Checkpoint
from spike_export.checkpoint.families import Experts
from spike_export.engines.onnx_runtime.taps import LOGITS
from spike_export.engines.parity.forcing import Forcing
from spike_export.engines.parity.simulated_model import tapped_linears


def transformers_model(checkpoint: Checkpoint) -> Any:
    """Return transformers' model in float32; memory holds all of it."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = AutoConfig.for_model(**{**checkpoint.config.hf, "dtype": "float32"})
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    tensors = {name: torch.from_numpy(checkpoint.tensors.read(name)) for name in checkpoint.tensors.shapes}
    tensors.setdefault(LM_HEAD, tensors.get(EMBEDDING, torch.empty(0)))
    tensors.setdefault(EMBEDDING, tensors[LM_HEAD])
    if checkpoint.config.family.experts is not None:
        _stack(tensors, checkpoint.config.family.experts, checkpoint.config.num_hidden_layers)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _stack(tensors: dict[str, torch.Tensor], experts: Experts, layers: int) -> None:
    """Put the experts' weights of each layer into the two tensors of transformers' model, gate above up, in place."""
    for layer in range(layers):
        block, place = f"model.layers.{layer}.{experts.block}", f"model.layers.{layer}.mlp"
        router = tensors.pop(f"{block}.gate.weight")
        rows = {
            name: [tensors.pop(f"{block}.experts.{index}.{name}.weight") for index in range(len(router))]
            for name in (experts.gate, experts.up, experts.down)
        }
        pairs = zip(rows[experts.gate], rows[experts.up], strict=True)
        tensors[f"{place}.gate.weight"] = router
        tensors[f"{place}.experts.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
        tensors[f"{place}.experts.down_proj"] = torch.stack(rows[experts.down])


def run_transformers(
    model: Any, checkpoint: Checkpoint, tokens: NDArray[np.int64], prefix: tuple[int, ...], forcing: Forcing
) -> None:
    """Run windows [windows, tokens] behind a prefix through the model, with the hooks of `forcing`."""
    before = np.tile(np.array(prefix, np.int64), (len(tokens), 1))
    whole = torch.from_numpy(np.concatenate([before, tokens], axis=1))
    with torch.inference_mode(), forcing.on(_modules(model, checkpoint)):
        mask = _mask(checkpoint, len(prefix), tokens.shape[1])
        logits = model(whole, attention_mask=mask, use_cache=False).logits
    forcing.computed[LOGITS] = logits[:, len(prefix) :].float().numpy()


def _modules(model: Any, checkpoint: Checkpoint) -> dict[str, nn.Module]:
    """Return linears, routers and layers by the names that the checkpoint has; experts have no modules of their own."""
    layers = (f"model.layers.{index}" for index in range(checkpoint.config.num_hidden_layers))
    experts = checkpoint.config.family.experts
    block = "mlp" if experts is None else experts.block
    places = {name: name.replace(f".{block}.", ".mlp.") for name in tapped_linears(checkpoint)}
    return {name: model.get_submodule(place) for name, place in (places | {name: name for name in layers}).items()}


def _mask(checkpoint: Checkpoint, prefix: int, tokens: int) -> Any:
    """Return the masks where a window would hide the prefix; None leaves them to transformers."""
    config, total = checkpoint.config, prefix + tokens
    if not prefix or not any(window is not None and window <= total for window in config.windows):
        return None
    kinds = {"full_attention": None, "sliding_attention": config.sliding_window}
    masks = {kind: _additive(prefix, tokens, window) for kind, window in kinds.items()}
    return masks if config.hf.get("layer_types") else masks["sliding_attention"]


def _additive(prefix: int, tokens: int, window: int | None) -> torch.Tensor:
    """Return [1, 1, total, total]: 0 where a token sees another, else minus infinity."""
    total = prefix + tokens
    seen = torch.ones(total, total, dtype=torch.bool).tril()
    of_tokens = visible(prefix, tokens, window)
    if of_tokens is not None:
        seen[prefix:] = of_tokens[0, 0]
    return torch.where(seen, 0.0, -torch.inf)[None, None]
