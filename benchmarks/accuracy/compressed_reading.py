"""A checkpoint in compressed-tensors computed by transformers' model, read with nothing of spike-export's."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM


def stored_state(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint's files."""
    state: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    return state


def config_of(folder: Path) -> dict[str, Any]:
    """Return `config.json`."""
    document: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return document


def group_of(config: Mapping[str, Any], module: str) -> Mapping[str, Any] | None:
    """Return the group that names a linear, or the only one; None where it is ignored."""
    if module in config["ignore"]:
        return None
    groups = list(config["config_groups"].values())
    if len(groups) == 1:
        assert groups[0]["targets"] == ["Linear"]
        return dict(groups[0])
    (found,) = [group for group in groups if module in group["targets"]]
    return dict(found)


def computed_model(folder: Path, token_range: float = 127.0) -> Any:
    """Return transformers' model with restored weights and rounded inputs, straight from the format's definition.

    Args:
        folder: The checkpoint.
        token_range: What a token's largest magnitude is divided by for its scale: 127 in vLLM's kernels, 127.5 in the
            library compressed-tensors.
    """
    config, state = config_of(folder), stored_state(folder)
    quantization = config.pop("quantization_config")
    rounding: dict[str, Any] = {}
    for name in [name for name in state if name.endswith(".weight_scale")]:
        module = name.removesuffix(".weight_scale")
        group = group_of(quantization, module)
        assert group is not None, module
        scale, step = state.pop(name), state.pop(f"{module}.input_scale", None)
        state[f"{module}.weight"] = state[f"{module}.weight"].float() * scale
        assert (step is None) is group["input_activations"]["dynamic"]
        rounding[module] = _rounded_input(step, token_range)
    state = {name: tensor.float() for name, tensor in state.items()}
    if config.get("tie_word_embeddings"):
        state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    settings = {**config, "dtype": "float32"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), attn_implementation="eager")
    model.load_state_dict(state)
    for module, hook in rounding.items():
        model.get_submodule(module).register_forward_pre_hook(hook)
    return model.eval()


def _rounded_input(step: torch.Tensor | None, token_range: float) -> Any:
    def hook(_: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        values = inputs[0].float()
        scale = values.abs().amax(-1, keepdim=True).clamp(min=1e-5) / token_range if step is None else step
        return (torch.clamp(torch.round(values / scale), -128, 127) * scale,)

    return hook
