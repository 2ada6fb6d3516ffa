"""Fake quantization by a recipe, in plain torch on transformers' model, without a line of spike-export's code.

It reads recipe.json as JSON and the model through transformers, rounds weights and inputs as docs/recipes.md says, and
prints the perplexity of evenly spaced windows of a text, without quantization and with it, both behind the recipe's
prefix. It knows models whose linears have LLaMA's names, INT8, and heads and attention that are not quantized.
Run: python -m tests.independent.fake_quantization --model DIRECTORY --recipe RUN/recipe.json [--windows N] TEXT
"""

import argparse
import base64
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

READERS = {
    "self_attn.q_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.up_proj": ("mlp.up_proj", "mlp.gate_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
"""The linear that names an input → all that read the input."""


def load(path: Path) -> tuple[Any, Any]:
    """Return model and tokenizer of a Hugging Face directory, in float32."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(path)


def stored_scales(plan: dict[str, Any]) -> torch.Tensor:
    """Return the scales of a smoothed input as the recipe holds them: 2 ** (k / 8), k in Base64."""
    k = np.frombuffer(base64.b64decode(plan["exponents"]), np.int8).astype(np.float64)
    return torch.from_numpy(2.0 ** (k / 8)).float()


def channel_scales(recipe: dict[str, Any], channels: dict[str, int]) -> dict[str, torch.Tensor]:
    """Return for each smoothed linear what the channels of its input are divided by.

    The value heads of attention's output have one scale for all query heads that share them.
    """
    found = {}
    for name, plan in recipe["smoothing"].items():
        layer, _, place = name.partition("self_attn" if "self_attn" in name else "mlp")
        scales = stored_scales(plan)
        for reader in READERS[name.removeprefix(layer)]:
            full = layer + reader
            shared = channels[full] // len(scales)
            if shared > 1:
                head = channels["head_dim"]
                scales = scales.reshape(-1, 1, head).expand(-1, shared, head).reshape(-1)
            found[full] = scales
        assert place
    return found


def input_blocks(recipe: dict[str, Any]) -> dict[str, int]:
    """Return linear → channels of a block of the Hadamard transform of its input, at run time or of value heads."""
    found: dict[str, int] = dict(recipe.get("value_rotation", {}))
    for name, block in recipe.get("input_hadamard", {}).items():
        _, _, number, inner = name.split(".", 3)
        found |= {f"model.layers.{number}.{reader}": block for reader in READERS[inner]}
    return found


def rounded_weight(weight: torch.Tensor) -> torch.Tensor:
    """Return a weight [out, in] after INT8 with a scale per output channel: amax / 127."""
    step = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
    return (weight / step).round().clamp(-127, 127) * step


def rounded_input(values: torch.Tensor, plan: dict[str, Any]) -> torch.Tensor:
    """Return an input after INT8, with the recipe's scale or with each token's own: amax / 127."""
    if plan.get("activations") == "per-token":
        step = values.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5) / 127
    else:
        step = torch.tensor(plan["activation_scale"], dtype=torch.float32)
    return (values / step).round().clamp(-128, 127) * step


def transformed(values: torch.Tensor, block: int) -> torch.Tensor:
    """Return values [..., channels] multiplied by Sylvester's Hadamard matrix over the root of its size, in blocks."""
    matrix = torch.ones(1, 1)
    while len(matrix) < block:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return (values.unflatten(-1, (-1, block)) @ matrix / block**0.5).flatten(-2)


class FakeQuantized(nn.Module):
    """A linear whose weight, and whose input where the recipe says so, pass through INT8.

    One that makes values for `o_proj` also takes up `values`: what that linear divides its input by, and its block.
    """

    def __init__(
        self,
        linear: nn.Linear,
        plan: dict[str, Any],
        scales: torch.Tensor | None,
        block: int,
        values: tuple[torch.Tensor, int] | None = None,
    ) -> None:
        """Round the weight, whose columns take up what the input is divided by, and how it is transformed."""
        super().__init__()
        self.values = values
        self.plan, self.bias, self.whole, self.block = plan, linear.bias, linear.weight, block
        self.scales = torch.ones(linear.in_features) if scales is None else scales
        weight = transformed(linear.weight.detach() * self.scales, block)
        if values is not None:
            weight = transformed((weight / values[0][:, None]).T, values[1]).T
        self.weight = rounded_weight(weight)
        self.rounds = True

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Return the product; the plain one while the prefix is computed."""
        if not self.rounds:
            return nn.functional.linear(values, self.whole, self.bias)
        values = transformed(values / self.scales, self.block)
        if self.plan["precision"] == "int8":
            values = rounded_input(values, self.plan)
        result = nn.functional.linear(values, self.weight)
        if self.values is not None:
            result = transformed(result, self.values[1]) * self.values[0]
        return result if self.bias is None else result + self.bias


def quantize(model: Any, recipe: dict[str, Any]) -> list[FakeQuantized]:
    """Replace the linears that a recipe quantizes; return what took their places."""
    scheme = recipe["scheme"]
    assert (scheme["weights"], scheme["head"], recipe["rotation"]) == ("int8-per-channel", "unquantized", None)
    assert not recipe["attention"]
    channels = {name: module.in_features for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    hidden, heads = model.config.hidden_size, model.config.num_attention_heads
    channels["head_dim"] = getattr(model.config, "head_dim", None) or hidden // heads
    scales = channel_scales(recipe, channels)
    blocks = input_blocks(recipe)
    placed = []
    for name, plan in recipe["modules"].items():
        if plan["precision"] != "int8" and plan.get("weights") != "int8":
            continue
        parent, _, leaf = name.rpartition(".")
        place = model.get_submodule(parent)
        rotated = recipe.get("value_rotation", {})
        block = recipe["hadamard"]["block"] if recipe.get("hadamard") and leaf == "down_proj" else blocks.get(name, 1)
        linear, output, values = getattr(place, leaf), f"{parent}.o_proj", None
        if leaf == "v_proj" and output in rotated:
            smoothed = recipe["smoothing"].get(output)
            divisors = stored_scales(smoothed) if smoothed else torch.ones(linear.out_features)
            values = divisors, rotated[output]
        placed.append(FakeQuantized(linear, plan, scales.get(name), block, values))
        setattr(place, leaf, placed[-1])
    return placed


@torch.inference_mode()
def perplexity(model: Any, windows: np.ndarray[Any, Any], prefix: list[int], placed: list[FakeQuantized]) -> float:
    """Return the perplexity of windows [windows, tokens] but for their first tokens, one window at a time.

    The prefix stands in the cache, computed without quantization; BOS is fed before a window unless the prefix has it.
    """
    bos = model.config.bos_token_id
    cache = DynamicCache(config=model.config)
    for each in placed:
        each.rounds = False
    if prefix:
        model(torch.tensor([prefix]), past_key_values=cache, use_cache=True)
    for each in placed:
        each.rounds = True
    losses = []
    for window in windows:
        fed = torch.from_numpy(window)[None]
        if bos is not None and bos not in prefix:
            fed = torch.cat([torch.tensor([[bos]]), fed], dim=1)
        logits = model(fed, past_key_values=copy.deepcopy(cache), use_cache=True).logits[0, -len(window) : -1]
        losses.append(nn.functional.cross_entropy(logits.double(), torch.from_numpy(window[1:])))
    return float(torch.stack(losses).mean().exp())


def compared(model: Any, recipe: dict[str, Any], windows: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Return the perplexities without quantization and by the recipe, both behind its prefix; the model is changed."""
    prefix = recipe["prefix"]["token_ids"] if recipe["prefix"] else []
    plain = perplexity(model, windows, prefix, [])
    return plain, perplexity(model, windows, prefix, quantize(model, recipe))


def evenly_spaced(tokens: list[int], count: int, length: int) -> np.ndarray[Any, Any]:
    """Return windows [count, length] from the first token to the last."""
    starts = np.linspace(0, len(tokens) - length, count).astype(int)
    return np.array([tokens[start : start + length] for start in starts])


def main() -> None:
    """Print both perplexities, and the increase."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=16)
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.model)
    tokens = tokenizer(arguments.text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    recipe = json.loads(arguments.recipe.read_text(encoding="utf-8"))
    plain, quantized = compared(model, recipe, evenly_spaced(tokens, arguments.windows, 511))
    print(f"unquantized {plain:.3f}  by the recipe {quantized:.3f}  {quantized / plain - 1:+.2%}")


if __name__ == "__main__":
    main()
