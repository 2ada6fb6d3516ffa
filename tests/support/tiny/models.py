"""Random small LLaMA and Mistral models, as transformers builds them and as checkpoints; and sessions over bundles."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from spike_export.artifacts.process.threads import allowed_threads
from spike_export.artifacts.recipe import CorpusSource, Dtype, ModelSource, ModulePlan, Prefix, Recipe, Scheme
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.checkpoint.decoder_config import decoder_config
from spike_export.checkpoint.modules import linears
from spike_export.engines.onnx_runtime.exact_products import request_exact_products

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


@dataclass(frozen=True)
class MemoryTensors:
    """A `TensorSource` over arrays."""

    tensors: Mapping[str, NDArray[np.float32]]

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def read(self, name: str) -> NDArray[np.float32]:
        return self.tensors[name]

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            digest.update(name.encode() + self.tensors[name].tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class TinyModel:
    """One model twice: transformers' own, and the checkpoint that export reads."""

    reference: Any
    checkpoint: Checkpoint


def model_with_bos(model: "TinyModel", bos: int) -> "TinyModel":
    """Return the same weights with a token that begins every sequence."""
    config = replace(model.checkpoint.config, bos_token_id=bos)
    return replace(model, checkpoint=replace(model.checkpoint, config=config))


def tiny_llama(
    *,
    tie: bool = False,
    biases: bool = False,
    rope: Mapping[str, Any] | None = None,
    sliding_window: int | None = None,
    layers: int = 2,
    max_positions: int = 128,
    seed: int = 0,
) -> TinyModel:
    """GQA 4/2, head_dim 16, hidden 48 (so that heads * head_dim differs from it); Mistral where a window is given."""
    settings: dict[str, Any] = {
        "vocab_size": 99,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": tie,
        "rope_parameters": dict(rope or {"rope_type": "default", "rope_theta": 10000.0}),
        "initializer_range": 0.15,
        "attn_implementation": "eager",
    }
    torch.manual_seed(seed)
    if sliding_window is None:
        config = LlamaConfig(**settings, attention_bias=biases, mlp_bias=biases)
        reference = LlamaForCausalLM(config)
    else:
        config = MistralConfig(**settings, sliding_window=sliding_window)
        reference = MistralForCausalLM(config)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    reference = reference.eval().requires_grad_(False)
    return TinyModel(reference, _checkpoint(reference, tie))


def _checkpoint(reference: Any, tie: bool) -> Checkpoint:
    tensors = {
        name: tensor.numpy().astype(np.float32)
        for name, tensor in reference.state_dict().items()
        if not (tie and name == "lm_head.weight")
    }
    return Checkpoint(
        name="tiny",
        config=decoder_config(reference.config.to_dict(), "tiny"),
        tensors=MemoryTensors(tensors),
        tokenizer=None,
        generation_config={},
    )


def tiny_recipe(
    checkpoint: Checkpoint,
    scales: Mapping[str, float],
    *,
    kept: Mapping[str, Dtype] | None = None,
    prefix: Sequence[int] = (),
    scheme: Scheme | None = None,
) -> Recipe:
    """Every linear INT8 with its scale, but those in `kept`."""
    modules = {
        name: ModulePlan(precision=kept[name], ratio=900.5, reason="test")
        if kept and name in kept
        else ModulePlan(precision="int8", activation_scale=scales[name], ratio=3.25)
        for name in linears(checkpoint.config)
    }
    return Recipe(
        model=ModelSource(source="tiny", architecture="llama", sha256=checkpoint.tensors.sha256()),
        corpus=CorpusSource(name="none", sha256="0", samples=1, length=1, seed=0),
        scheme=scheme or Scheme(),
        alpha=None,
        prefix=Prefix(token_ids=tuple(prefix), text="?", ratio=1.0) if prefix else None,
        modules=modules,
    )


def unquantized_recipe(checkpoint: Checkpoint, prefix: Sequence[int] = (), dtype: Dtype = "float32") -> Recipe:
    """Keep every linear: the way to a prefix without quantization."""
    return tiny_recipe(checkpoint, {}, kept=dict.fromkeys(linears(checkpoint.config), dtype), prefix=prefix)


def input_scales(model: TinyModel, tokens: NDArray[np.int64]) -> dict[str, float]:
    """Per linear, amax / 127 of its input over `tokens`, as a float32 value."""
    scales: dict[str, float] = {}
    handles = []
    for name in linears(model.checkpoint.config):

        def record(_: Any, inputs: tuple[torch.Tensor], name: str = name) -> None:
            scales[name] = float(np.float32(inputs[0].abs().max().item() / 127))

        handles.append(model.reference.get_submodule(name).register_forward_pre_hook(record))
    model.reference(torch.from_numpy(tokens))
    for handle in handles:
        handle.remove()
    return scales


class CachedSession:
    """An ONNX Runtime session over a bundle, called as a user of the bundle would: own tokens and own mask only.

    Its INT8 products are exact, as in a session of ours; denormals stay, as in a foreign one.
    """

    def __init__(self, bundle: Path, optimized: Path | None = None) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = allowed_threads() or 2
        options.log_severity_level = 3
        request_exact_products(options)
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
        self.session = ort.InferenceSession(str(bundle / "model.onnx"), options, providers=["CPUExecutionProvider"])
        self.cache: list[NDArray[Any]] = []
        self.reset()

    def reset(self, batch: int = 1) -> None:
        """Begin fresh sequences."""
        pasts = self.session.get_inputs()[2:]
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        self.cache = [np.zeros((batch, p.shape[1], 0, p.shape[3]), kinds[p.type]) for p in pasts]

    def step(self, tokens: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """Feed tokens [batch, sequence] with the mask of all own tokens so far; return logits."""
        names = [value.name for value in self.session.get_inputs()]
        feeds = dict(zip(names, [tokens, mask, *self.cache], strict=True))
        logits, *self.cache = self.session.run(None, feeds)
        return logits

    def run(self, tokens: NDArray[np.int64], chunks: Sequence[int] = ()) -> NDArray[np.float32]:
        """Feed fresh sequences in chunks of these sizes (all at once by default); return all logits."""
        self.reset(len(tokens))
        ends = np.cumsum(chunks) if chunks else [tokens.shape[1]]
        parts, start = [], 0
        for end in ends:
            parts.append(self.step(tokens[:, start:end], np.ones((len(tokens), end), np.int64)))
            start = end
        return np.concatenate(parts, axis=1)
