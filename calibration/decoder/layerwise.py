"""The unquantized decoder in torch, forwarded one layer at a time over all windows.

A layer is read, applied to every window, and (unless it is to stay) dropped: memory holds one layer, or the head, and
the windows' activations, which go to a file when they are many. The result is that of a whole-model pass, bit for bit.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.progress import Progress, silent
from spike_export.artifacts.recipe import HEAD_WEIGHTS, SMOOTHED_HEAD, Dtype, HeadScheme, SmoothingPlan
from spike_export.calibration.decoder.activations import Activations
from spike_export.calibration.decoder.equivalent.smoothing import plan_scales
from spike_export.calibration.decoder.heap import return_freed_memory
from spike_export.calibration.decoder.simulate import QuantizedWeights, fake_quantize_tokens
from spike_export.checkpoint.checkpoint import EMBEDDING, LM_HEAD, Checkpoint
from spike_export.checkpoint.decoder_config import DecoderConfig, layer_shapes

if TYPE_CHECKING:
    import torch
    from torch import nn

    from spike_export.calibration.decoder.layers.attention import AttentionContext, KeyValue
    from spike_export.calibration.decoder.layers.layer import DecoderLayer, TorchDecoder

BATCH_TOKENS = 1024
"""Tokens per forward call: large enough for fast matrix products, small enough for some hundred MB of activations."""

FINAL_NORM = "model.norm.weight"

KeyValues = list[tuple[NDArray[np.float32], NDArray[np.float32]]]
"""Per layer (key, value), each [kv_heads, prefix tokens, head_dim] float32; keys already rotated (positions 0..)."""

Visit = Callable[[int, "nn.Module"], AbstractContextManager[None]]
"""Entered around a layer's forwards with (layer index, module); observes or replaces what is inside."""


@dataclass(frozen=True)
class Execution:
    """Where and how the decoder runs; the statistics of two executions of one device and dtype are equal.

    Attributes:
        devices: torch devices; with several, each takes its share of the windows.
        dtype: Precision of weights and activations.
        resident: Whether layers stay in memory once read. A model that does not fit is read anew in every pass.
        activation_bytes: Largest size of the windows' activations that stays in memory; beyond, they go to a file.
        scratch: Folder for that file; the system's temporary folder by default.
    """

    devices: tuple[str, ...] = ("cpu",)
    dtype: Dtype = "float32"
    resident: bool = True
    activation_bytes: int = 1 << 30
    scratch: Path | None = None


def batch_size(length: int, tokens: int) -> int:
    """Return how many windows of `length` tokens a forward batch of about `tokens` tokens has."""
    return max(1, tokens // max(1, length))


def batches(windows: NDArray[np.int64], tokens: int = BATCH_TOKENS) -> list[NDArray[np.int64]]:
    """Split [samples, length] windows into forward batches of about `tokens` tokens."""
    size = batch_size(windows.shape[1], tokens)
    return [windows[start : start + size] for start in range(0, len(windows), size)]


@dataclass
class Meter:
    """Counts what was computed: tokens through the whole decoder, those through some of its layers in proportion."""

    token_layers: int = 0
    layers: int = 1

    @property
    def tokens(self) -> int:
        """Tokens through the whole decoder, rounded."""
        return round(self.token_layers / self.layers)


@dataclass(frozen=True)
class Decoder:
    """A checkpoint's decoder, ready to run.

    Attributes:
        checkpoint: The weights.
        execution: Devices, precision, and what stays in memory.
        meter: Counts the tokens that `run` forwards.
    """

    checkpoint: Checkpoint
    execution: Execution = Execution()
    meter: Meter = field(default_factory=Meter, repr=False)
    _skeleton: "list[TorchDecoder]" = field(default_factory=list, repr=False)
    _resident: dict[str, Any] = field(default_factory=dict, repr=False)
    _int8_heads: dict[SmoothingPlan | None, QuantizedWeights] = field(default_factory=dict, repr=False)

    @property
    def config(self) -> DecoderConfig:
        """The decoder's configuration."""
        return self.checkpoint.config

    @property
    def skeleton(self) -> "TorchDecoder":
        """The modules; the layers are empty unless they are resident or in use."""
        import torch

        from spike_export.calibration.decoder.layers.layer import empty_decoder

        if not self._skeleton:
            self._skeleton.append(empty_decoder(self.config, getattr(torch, self.execution.dtype)))
        return self._skeleton[0]

    def _read(self, name: str) -> "torch.Tensor":
        return self._placed(self.checkpoint.tensor(name))

    def _placed(self, values: NDArray[np.float32]) -> "torch.Tensor":
        import torch

        return torch.from_numpy(values).to(self.execution.devices[0], getattr(torch, self.execution.dtype))

    def _kept(self, name: str) -> "torch.Tensor":
        """Read a tensor, and keep it where tensors are resident; the tied head and embedding are one."""
        if not self.execution.resident:
            return self._read(name)
        key = EMBEDDING if name == LM_HEAD and self.config.tie_word_embeddings else name
        if key not in self._resident:
            self._resident[key] = self._read(name)
        tensor: torch.Tensor = self._resident[key]
        return tensor

    @contextmanager
    def layer(self, index: int) -> "Iterator[DecoderLayer]":
        """Within the block, the layer has its weights, on the first device."""
        layer = cast("DecoderLayer", self.skeleton.layers[index])
        if index not in self._resident.get("layers", ()):
            for name in layer_shapes(self.config):
                self._assign(layer, name, self._read(f"model.layers.{index}.{name}"))
            if self.execution.resident:
                self._resident.setdefault("layers", set()).add(index)
        try:
            yield layer
        finally:
            if not self.execution.resident:
                _drop(layer)
                return_freed_memory()

    @staticmethod
    def _assign(layer: "nn.Module", name: str, tensor: "torch.Tensor") -> None:
        from torch import nn

        module, _, leaf = name.rpartition(".")
        setattr(layer.get_submodule(module), leaf, nn.Parameter(tensor, requires_grad=False))

    def run(
        self,
        windows: NDArray[np.int64],
        prefix: Sequence[int] = (),
        *,
        layers: int | None = None,
        visits: Sequence[Visit] = (),
        batch_tokens: int = BATCH_TOKENS,
        progress: Progress = silent,
    ) -> Activations:
        """Forward token windows [samples, length] and return the last layer's output, batch by batch.

        Args:
            windows: Tokens; those of the prefix are not among them.
            prefix: Token ids whose keys and values stand before every window. They pass each layer before the
                visits are entered, so that they are neither observed nor quantized.
            layers: Number of layers to pass; all by default.
            visits: What to do around each layer.
            batch_tokens: Tokens per forward call, 1 for one window at a time.
            progress: Told after each layer.
        """
        import torch

        count = self.config.num_hidden_layers if layers is None else layers
        self.meter.layers = self.config.num_hidden_layers
        self.meter.token_layers += windows.size * count
        with torch.inference_mode():
            states = self.first_states(batches(windows, batch_tokens))
            for index, layer, context in self.layers_in_turn(windows.shape[1], prefix, count):
                self._apply(index, layer, states, context, visits)
                progress("layers", index + 1, count)
        return states

    def first_states(self, parts: Sequence[NDArray[np.int64]]) -> Activations:
        """Return what the first layer reads of forward batches [samples, length]."""
        return_freed_memory()
        setting, shapes = self.execution, [(*part.shape, self.config.hidden_size) for part in parts]
        states = Activations.allocate(shapes, setting.dtype, setting.activation_bytes, setting.scratch)
        self._embed(parts, states)
        return states

    def layers_in_turn(
        self, tokens: int, prefix: Sequence[int], count: int
    ) -> "Iterator[tuple[int, DecoderLayer, AttentionContext]]":
        """Yield the first `count` layers, each with its weights until the next, and what it is told of the sequences.

        Args:
            tokens: Of a sequence, without the prefix.
            prefix: Token ids whose keys and values stand before every sequence.
            count: Layers to pass.
        """
        places, run_prefix = self.contexts(tokens, len(prefix)), _PrefixStream(self, prefix)
        for index in range(count):
            with self.layer(index) as layer:
                yield index, layer, replace(places[index], past=run_prefix.through(index, layer))

    def prefix_key_values(self, prefix: Sequence[int]) -> KeyValues:
        """Return what the attention of every layer caches of a prefix, in full precision.

        Source: arXiv 2405.14428, "quantization-free prefix": the prefix never meets a quantizer.
        """
        import torch

        cached: KeyValues = []
        with torch.inference_mode():
            stream = _PrefixStream(self, prefix)
            for index in range(self.config.num_hidden_layers):
                with self.layer(index) as layer:
                    past = stream.through(index, layer)
                    assert past is not None
                    key, value = (states[0].float().cpu().numpy().copy() for states in (past.key, past.value))
                    cached.append((key, value))
        return cached

    def _embed(self, parts: Sequence[NDArray[np.int64]], states: Activations) -> None:
        import torch

        if self.execution.resident:
            weight, places = self._kept(EMBEDDING), list(parts)
        else:
            # Of a large vocabulary the whole embedding is several times a layer; the windows use a few rows.
            used = np.unique(np.concatenate([part.ravel() for part in parts]))
            weight = self._placed(self.checkpoint.rows(EMBEDDING, used))
            places = [np.searchsorted(used, part) for part in parts]
        self._assign(self.skeleton, "embed_tokens.weight", weight)
        for index, part in enumerate(places):
            states.put(index, self.skeleton.embedded(torch.from_numpy(part).to(self.execution.devices[0])))
        if not self.execution.resident:
            _drop(self.skeleton.embed_tokens)

    def embedded(self, tokens: NDArray[np.int64]) -> "torch.Tensor":
        """Return what the first layer reads of tokens [samples, length]: [samples, length, hidden]."""
        import torch

        self._assign(self.skeleton, "embed_tokens.weight", self._kept(EMBEDDING))
        return self.skeleton.embedded(torch.from_numpy(tokens).to(self.execution.devices[0]))

    def contexts(self, tokens: int, past: int) -> "list[AttentionContext]":
        """Return what each layer is told about sequences of `tokens` tokens behind a prefix of `past`, without it.

        Layers of one kind share the tensors.
        """
        import torch

        from spike_export.calibration.decoder.layers.attention import AttentionContext, visible
        from spike_export.calibration.decoder.layers.rotary import rotary_at

        config = self.config
        dtype = torch.float32 if config.family.float32_rotation else getattr(torch, self.execution.dtype)
        rotaries = {kind: rotary_at(config.rope(kind), past, tokens).to(dtype) for kind in config.ropes}
        masks = {window: visible(past, tokens, window) for window in config.windows}
        return [
            AttentionContext(rotaries[config.layer_rope(index)], masks[config.layer_window(index)])
            for index in range(config.num_hidden_layers)
        ]

    def _apply(
        self,
        index: int,
        layer: "DecoderLayer",
        states: Activations,
        context: "AttentionContext",
        visits: Sequence[Visit],
    ) -> None:
        devices = self.execution.devices
        copies = [layer, *(copy.deepcopy(layer).to(device) for device in devices[1:])]

        def share(place: int) -> None:
            import torch

            device, module = devices[place], copies[place]
            with torch.inference_mode(), ExitStack() as stack:
                for visit in visits:
                    stack.enter_context(visit(index, module))
                told = context.to(device)
                for part in range(place, len(states), len(devices)):
                    module.batch, module.shape = part, states.shapes[part][:2]
                    states.put(part, module(states.get(part, device), told))

        if len(devices) == 1:
            share(0)
            return
        with ThreadPoolExecutor(len(devices)) as pool:
            list(pool.map(share, range(len(devices))))

    def head(self, scheme: HeadScheme = "unquantized", smoothing: SmoothingPlan | None = None) -> "Head":
        """Return what turns the last layer's output into logits; `smoothing` is that of a head in INT8."""
        return Head(self, scheme, smoothing)

    def _int8_head(self, smoothing: SmoothingPlan | None) -> QuantizedWeights:
        """Return the store of one smoothing's INT8 weight; the last one stays, the others are forgotten."""
        if smoothing not in self._int8_heads:
            self._int8_heads.clear()
            self._int8_heads[smoothing] = QuantizedWeights(HEAD_WEIGHTS, keep=self.execution.resident)
        return self._int8_heads[smoothing]


class _PrefixStream:
    """A prefix on its way through the layers, in full precision."""

    def __init__(self, decoder: Decoder, prefix: Sequence[int]) -> None:
        self.states: Any = None
        if prefix:
            tokens = np.array([list(prefix)], np.int64)
            device = decoder.execution.devices[0]
            self.contexts = [each.to(device) for each in decoder.contexts(len(prefix), 0)]
            shape = (*tokens.shape, decoder.config.hidden_size)
            held = Activations.allocate([shape], decoder.execution.dtype, decoder.execution.activation_bytes, None)
            decoder._embed([tokens], held)
            self.states = held.get(0, device)

    def through(self, index: int, layer: "DecoderLayer") -> "KeyValue | None":
        """Pass one layer; return what its attention caches, or None without a prefix."""
        if self.states is None:
            return None
        seen: list[KeyValue] = []
        with layer.self_attn.watched(seen):
            self.states = layer(self.states, self.contexts[index])
        return seen[0]


class Head:
    """Final norm, language-model head, its divisor and soft cap; the weights stay while the object lives.

    A quantized head computes in float32, as in the graph. Its smoothing, where it has one, divides the norm's output
    and multiplies the weight's columns, before both are rounded.
    """

    def __init__(
        self, decoder: Decoder, scheme: HeadScheme = "unquantized", smoothing: SmoothingPlan | None = None
    ) -> None:
        import torch

        self._scheme = scheme
        self._norm = decoder.skeleton.norm
        decoder._assign(decoder.skeleton, "norm.weight", decoder._kept(FINAL_NORM))
        weight = decoder._kept(LM_HEAD)
        smoothed = smoothing if scheme == SMOOTHED_HEAD else None
        self._scales = None if smoothed is None else torch.from_numpy(plan_scales(smoothed)).to(weight.device)
        quantized = scheme != "unquantized"
        self._weight = (
            decoder._int8_head(smoothed).dequantized("lm_head", weight, self._scales) if quantized else weight
        )
        self._factors = decoder.config.factors
        self._device = decoder.execution.devices[0]

    def normed(self, states: "torch.Tensor") -> "torch.Tensor":
        """Return the final norm's output for the last layer's [..., hidden], before any smoothing."""
        return cast("torch.Tensor", self._norm(states.to(self._device)))

    def logits(self, states: "torch.Tensor") -> "torch.Tensor":
        """Return [..., vocab] for the last layer's output [..., hidden]; gradients pass an unquantized head."""
        import torch

        normed = self.normed(states).to(self._weight.dtype)
        if self._scales is not None:
            normed = normed / self._scales
        if self._scheme == "int8-per-token-dynamic":
            normed = fake_quantize_tokens(normed)
        logits = torch.nn.functional.linear(normed, self._weight)
        softcap = self._factors.final_softcap
        if self._factors.logits != 1:
            logits = logits / self._factors.logits
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _drop(module: "nn.Module") -> None:
    """Give the parameters' memory back."""
    import torch
    from torch import nn

    for name, parameter in list(module.named_parameters()):
        empty = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, empty)
