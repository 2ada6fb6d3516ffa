"""The unquantized decoder in torch, forwarded one layer at a time over all windows.

A layer is read, applied to every window, and (unless it is to stay) dropped: memory holds one layer, or the head, and
the windows' activations, which go to a file when they are many. Each layer is transformers' own, called with the
arguments that transformers' decoder passes it, so that the result is that of a whole-model pass, bit for bit.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.progress import Progress, silent
from spike_export.artifacts.recipe import HEAD_WEIGHTS, SMOOTHED_HEAD, Dtype, HeadScheme, SmoothingPlan
from spike_export.calibration.decoder.activations import Activations
from spike_export.calibration.decoder.attention_products import registered_attention
from spike_export.calibration.decoder.heap import return_freed_memory
from spike_export.calibration.decoder.simulate import QuantizedWeights, fake_quantize_tokens
from spike_export.calibration.decoder.smoothing import plan_scales
from spike_export.calibration.decoder.sparse_moe import sparse_moe
from spike_export.checkpoint.checkpoint import EMBEDDING, LM_HEAD, Checkpoint
from spike_export.checkpoint.decoder_config import DecoderConfig, layer_shapes

if TYPE_CHECKING:
    import torch
    from torch import nn

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


def hf_config(config: DecoderConfig) -> Any:
    """Return transformers' configuration object."""
    from transformers import AutoConfig

    settings = {key: value for key, value in config.hf.items() if key != "model_type"}
    return AutoConfig.for_model(config.family.model_type, **settings)


def empty_decoder(config: DecoderConfig, dtype: Dtype = "float32") -> Any:
    """Return transformers' decoder on the meta device (no memory), its rope tables on the CPU."""
    import torch
    from transformers import AutoModel

    settings = hf_config(config)
    with torch.device("meta"):
        attention = registered_attention()
        decoder = AutoModel.from_config(settings, attn_implementation=attention, dtype=getattr(torch, dtype))
        if config.family.experts:
            for layer in decoder.layers:
                layer.mlp = sparse_moe(config).to(getattr(torch, dtype))
                # Under the checkpoint's name too, where the layer's forward calls it by another.
                setattr(layer, config.family.feed_forward, layer.mlp)
    # It matters in training only, and need not be among the rows that are read.
    decoder.embed_tokens.padding_idx = None
    # What no checkpoint holds, rope frequencies and the embedding's factor (Gemma), is made outside the meta device.
    decoder.rotary_emb = type(decoder.rotary_emb)(settings)
    scale = getattr(decoder.embed_tokens, "scalar_embed_scale", None)
    if scale is not None:
        decoder.embed_tokens.embed_scale = torch.tensor(scale)
    return decoder.eval().requires_grad_(False)


def batches(windows: NDArray[np.int64], tokens: int = BATCH_TOKENS) -> list[NDArray[np.int64]]:
    """Split [samples, length] windows into forward batches of about `tokens` tokens."""
    size = max(1, tokens // max(1, windows.shape[1]))
    return [windows[start : start + size] for start in range(0, len(windows), size)]


class _Stub:
    """Stands in for a decoder layer: passes the states through and keeps the arguments that it was called with."""

    def __new__(cls, sink: list[dict[str, Any]]) -> Any:
        from torch import nn

        class Stub(nn.Module):
            def forward(self, states: "torch.Tensor", **arguments: Any) -> "torch.Tensor":
                sink.append(arguments)
                return states

        return Stub()


class _AfterPrefix:
    """The one thing a layer asks of a cache: new keys and values behind those of the prefix."""

    def __init__(self, key: "torch.Tensor", value: "torch.Tensor") -> None:
        self.key, self.value = key, value

    def update(self, key: "torch.Tensor", value: "torch.Tensor", *_: Any) -> "tuple[torch.Tensor, torch.Tensor]":
        import torch

        before = (states.expand(len(key), -1, -1, -1) for states in (self.key, self.value))
        return tuple(torch.cat([old, new], dim=2) for old, new in zip(before, (key, value), strict=True))  # type: ignore[return-value]


class _Capture:
    """A cache that is empty and keeps what it is given."""

    key: "torch.Tensor"
    value: "torch.Tensor"

    def update(self, key: "torch.Tensor", value: "torch.Tensor", *_: Any) -> "tuple[torch.Tensor, torch.Tensor]":
        self.key, self.value = key, value
        return key, value


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
    _skeleton: list[Any] = field(default_factory=list, repr=False)
    _resident: dict[str, Any] = field(default_factory=dict, repr=False)
    _int8_heads: dict[SmoothingPlan | None, QuantizedWeights] = field(default_factory=dict, repr=False)

    @property
    def config(self) -> DecoderConfig:
        """The decoder's configuration."""
        return self.checkpoint.config

    @property
    def skeleton(self) -> Any:
        """transformers' decoder; its layers are empty unless they are resident or in use."""
        if not self._skeleton:
            self._skeleton.append(empty_decoder(self.config, self.execution.dtype))
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
    def layer(self, index: int) -> "Iterator[nn.Module]":
        """Within the block, the layer has its weights, on the first device."""
        layer: nn.Module = self.skeleton.layers[index]
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
        parts = batches(windows, batch_tokens)
        return_freed_memory()
        self.meter.layers = self.config.num_hidden_layers
        self.meter.token_layers += windows.size * count
        with torch.inference_mode():
            calls = {part.shape: self._arguments(part.shape, len(prefix)) for part in parts}
            shapes = [(*part.shape, self.config.hidden_size) for part in parts]
            setting = self.execution
            states = Activations.allocate(shapes, setting.dtype, setting.activation_bytes, setting.scratch)
            self._embed(parts, states)
            run_prefix = _PrefixStream(self, prefix)
            for index in range(count):
                with self.layer(index) as layer:
                    past = run_prefix.through(index, layer)
                    self._apply(index, layer, states, [calls[part.shape][index] for part in parts], past, visits)
                progress("layers", index + 1, count)
        return states

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

        embedding = self.skeleton.embed_tokens
        if self.execution.resident:
            weight, places = self._kept(EMBEDDING), list(parts)
        else:
            # Of a large vocabulary the whole embedding is several times a layer; the windows use a few rows.
            used = np.unique(np.concatenate([part.ravel() for part in parts]))
            weight = self._placed(self.checkpoint.rows(EMBEDDING, used))
            places = [np.searchsorted(used, part) for part in parts]
        self._assign(self.skeleton, "embed_tokens.weight", weight)
        for index, part in enumerate(places):
            embedded = embedding(torch.from_numpy(part).to(self.execution.devices[0]))
            # Gemma's factor is the embedding's own; Granite's decoder multiplies when it is given tokens.
            states.put(index, embedded * getattr(self.skeleton, "embedding_multiplier", 1))
        if not self.execution.resident:
            _drop(embedding)

    def _arguments(self, shape: tuple[int, ...], past: int) -> list[dict[str, Any]]:
        """Return what transformers' decoder would pass to each layer for tokens [batch, length] behind a past."""
        import torch
        from torch import nn
        from transformers import DynamicCache

        calls: list[dict[str, Any]] = []
        decoder, config = self.skeleton, self.config
        cache = None
        if past:
            cache = DynamicCache()
            empty = torch.zeros(shape[0], config.num_key_value_heads, past, config.head_dim)
            for index in range(config.num_hidden_layers):
                cache.update(empty, empty, index)
        layers, norm, rotary = decoder.layers, decoder.norm, decoder.rotary_emb
        # Dynamic scaling remembers the longest sequence that it has seen: every call is a fresh sequence.
        decoder.rotary_emb = copy.deepcopy(rotary)
        decoder.layers = nn.ModuleList(_Stub(calls) for _ in layers)
        decoder.norm = nn.Identity()
        try:
            states = torch.zeros(*shape, config.hidden_size, dtype=getattr(torch, self.execution.dtype))
            decoder(inputs_embeds=states, past_key_values=cache, use_cache=cache is not None)
        finally:
            decoder.layers, decoder.norm, decoder.rotary_emb = layers, norm, rotary
        return [_prefix_visible(arguments, past) for arguments in calls]

    def _apply(
        self,
        index: int,
        layer: "nn.Module",
        states: Activations,
        calls: Sequence[dict[str, Any]],
        past: "_AfterPrefix | None",
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
                cache = past and _AfterPrefix(past.key.to(device), past.value.to(device))
                for part in range(place, len(calls), len(devices)):
                    _note(module, part, states.shapes[part])
                    arguments = {**_on_device(calls[part], device), "past_key_values": cache}
                    output = module(states.get(part, device), **arguments)
                    states.put(part, output[0] if isinstance(output, tuple) else output)

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
            self.calls = decoder._arguments(tokens.shape, 0)
            self.device = decoder.execution.devices[0]
            shape = (*tokens.shape, decoder.config.hidden_size)
            held = Activations.allocate([shape], decoder.execution.dtype, decoder.execution.activation_bytes, None)
            decoder._embed([tokens], held)
            self.states = held.get(0, self.device)

    def through(self, index: int, layer: "nn.Module") -> _AfterPrefix | None:
        """Pass one layer; return its keys and values [1, kv_heads, prefix, head_dim], or None without a prefix."""
        if self.states is None:
            return None
        cache = _Capture()
        arguments = {**_on_device(self.calls[index], self.device), "past_key_values": cache}
        output = layer(self.states, **arguments)
        self.states = output[0] if isinstance(output, tuple) else output
        return _AfterPrefix(cache.key, cache.value)


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
        import torch

        with torch.inference_mode():
            return cast("torch.Tensor", self._norm(states.to(self._device)))

    def logits(self, states: "torch.Tensor") -> "torch.Tensor":
        """Return [..., vocab] for the last layer's output [..., hidden]."""
        import torch

        with torch.inference_mode():
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


def _note(layer: Any, batch: int, shape: tuple[int, ...]) -> None:
    """Tell the visits which batch [samples, length] is under way."""
    layer.batch, layer.shape = batch, shape[:2]


def _drop(module: "nn.Module") -> None:
    """Give the parameters' memory back; buffers (Gemma's embedding factor) stay, because no checkpoint holds them."""
    import torch
    from torch import nn

    for name, parameter in list(module.named_parameters()):
        empty = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, empty)


def _on_device(value: Any, device: str) -> Any:
    """Move the tensors inside a layer's arguments."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_on_device(part, device) for part in value)
    if isinstance(value, dict):
        return {key: _on_device(part, device) for key, part in value.items()}
    return value


def _prefix_visible(arguments: dict[str, Any], past: int) -> dict[str, Any]:
    """Let every token see the prefix, also where a sliding window would have left it behind, as the graph does."""
    import torch

    mask = arguments.get("attention_mask")
    if past and isinstance(mask, torch.Tensor):
        mask = mask.clone()
        mask[..., :past] = True if mask.dtype == torch.bool else 0.0
        return {**arguments, "attention_mask": mask}
    return arguments
