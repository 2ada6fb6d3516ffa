"""One calibration pass: forward the windows, layer by layer, and record every representative module's input.

One pass yields all: token maxima (spikes), per-sample channel maxima (smoothing, static ranges), the operands of
attention, and the peaks that 16-bit formats have to hold.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.errors import CalibrationError
from spike_export.artifacts.progress import Progress, silent
from spike_export.calibration.decoder.layers.routing import routed_positions
from spike_export.calibration.decoder.layerwise import Decoder, batches
from spike_export.calibration.statistics.spikes import Floats, ModuleSpikes, SpikeStatistics
from spike_export.checkpoint.decoder_config import linear_shapes
from spike_export.checkpoint.modules import input_sites, split_name

if TYPE_CHECKING:
    import torch
    from torch import nn


class Recorder:
    """Collects the maxima of the layers it visits, one forward batch after another.

    Args:
        decoder: Whose layers are visited.
        modules: Restricts the record to these representatives; all by default, with outputs and operands.
        peaks_of: Per batch, of which samples [samples] bool outputs and attention's operands are recorded; all by
            default.
    """

    def __init__(
        self,
        decoder: Decoder,
        modules: tuple[str, ...] | None = None,
        peaks_of: Sequence[NDArray[np.bool_]] | None = None,
    ) -> None:
        self._config = decoder.config
        self._only = modules
        self._peaks_of = peaks_of
        # name → batch → arrays; filled by as many threads as there are devices, each with batches of its own.
        self._tokens: dict[str, dict[int, Floats]] = {}
        self._channels: dict[str, dict[int, Floats]] = {}
        self._outputs: dict[str, dict[int, Floats]] = {}
        self._hidden: dict[int, dict[int, Floats]] = {}
        self._operands: dict[str, dict[int, Floats]] = {}
        self._names: dict[str, None] = {}

    @contextmanager
    def visit(self, index: int, layer: "nn.Module") -> "Iterator[None]":
        """Within the block, the layer's forwards are recorded."""
        handles = []
        attention: Any = layer.get_submodule("self_attn")
        for site in input_sites(self._config):
            name = f"model.layers.{index}.{site.representative}"
            if self._only is not None and name not in self._only:
                continue
            self._names[name] = None
            linear = layer.get_submodule(site.representative)
            handles.append(linear.register_forward_pre_hook(self._input_hook(layer, name)))
            # What q, k and v yield is seen as attention's operands, and gate times up as down_proj's input.
            if self._only is None and site.behind_linear:
                handles += [
                    layer.get_submodule(reader).register_forward_hook(self._output_hook(layer, name))
                    for reader in site.readers
                ]
        if self._only is None:
            handles.append(layer.register_forward_hook(self._hidden_hook(layer, index)))
            attention.operands = self._operands_hook(layer, f"model.layers.{index}.self_attn")
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            if self._only is None:
                attention.operands = None

    def _input_hook(self, layer: Any, name: str) -> Any:
        def hook(_: "nn.Module", inputs: "tuple[torch.Tensor, ...]") -> None:
            rows, positions = inputs[0], routed_positions(layer, name)
            if positions is None and rows.dim() == 3:
                tokens, channels = _maxima(rows)
            else:
                tokens, channels = _routed_maxima(rows, positions, layer.shape)
            self._tokens.setdefault(name, {})[layer.batch] = tokens
            self._channels.setdefault(name, {})[layer.batch] = channels

        return hook

    def _takes_peaks(self, batch: int) -> bool:
        return self._peaks_of is None or bool(self._peaks_of[batch].any())

    def _output_hook(self, layer: Any, name: str) -> Any:
        def hook(_: "nn.Module", __: Any, output: "torch.Tensor") -> None:
            if not self._takes_peaks(layer.batch):
                return
            positions = routed_positions(layer, name)
            if positions is None:
                amax = _sample_amax(output.reshape(layer.shape[0], -1))
            else:
                channels = _routed_maxima(output, positions, layer.shape)[1]
                amax = channels.max(axis=1)
            self._outputs.setdefault(name, {})[layer.batch] = amax

        return hook

    def _hidden_hook(self, layer: Any, index: int) -> Any:
        def hook(_: "nn.Module", __: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            self._hidden.setdefault(index, {})[layer.batch] = _sample_amax(states)

        return hook

    def _operands_hook(self, layer: Any, name: str) -> Any:
        # Known also where none of the windows is recorded: the records of parts are to merge.
        self._operands.setdefault(name, {})

        def hook(*operands: "torch.Tensor") -> "tuple[torch.Tensor, ...]":
            if not self._takes_peaks(layer.batch):
                return operands
            tokens = operands[0].shape[2]  # keys and values of a prefix stand before these
            amax = [_sample_amax(each[:, :, -tokens:]) for each in operands]
            self._operands[name][layer.batch] = np.stack(amax, axis=1)
            return operands

        return hook

    def statistics(
        self, parts: Sequence[NDArray[np.int64]], prefix_ids: tuple[int, ...], sample_ids: NDArray[np.int64]
    ) -> SpikeStatistics:
        """Return what was recorded of forward batches [samples, length].

        Raises:
            CalibrationError: An input was not finite; names the place.
        """
        modules = {name: self._module(name, parts, sample_ids) for name in self._names}
        hidden = [_joined(found, parts) for found in self._hidden.values()]
        return SpikeStatistics(
            modules,
            np.concatenate(parts),
            prefix_ids,
            sample_ids,
            np.stack(hidden, axis=1) if hidden else np.empty((len(sample_ids), 0), np.float32),
            {name: self._operands_amax(found, parts) for name, found in self._operands.items()},
        )

    def _operands_amax(self, found: dict[int, Floats], parts: Sequence[NDArray[np.int64]]) -> Floats:
        for index, part in enumerate(parts):
            amax = found.setdefault(index, np.full((len(part), 3), np.nan, np.float32))
            if self._peaks_of is not None:
                amax[~self._peaks_of[index]] = np.nan
        return _joined(found, parts)

    def _module(self, name: str, parts: Sequence[NDArray[np.int64]], sample_ids: NDArray[np.int64]) -> ModuleSpikes:
        tokens, channels = self._tokens.get(name, {}), self._channels.get(name, {})
        _, width = linear_shapes(self._config)[split_name(name)[1]]
        outputs = self._outputs.get(name, {})
        for index, part in enumerate(parts):
            # An expert that got no token of a batch was not called.
            tokens.setdefault(index, np.full(part.shape, np.nan, np.float32))
            channels.setdefault(index, np.zeros((len(part), width), np.float32))
            peaks = outputs.setdefault(index, np.zeros(len(part), np.float32))
            if self._peaks_of is not None:
                peaks[~self._peaks_of[index]] = 0
        joined = _joined(channels, parts)
        _require_finite(name, joined, _joined(tokens, parts), sample_ids)
        return ModuleSpikes(_joined(tokens, parts), joined, _joined(outputs, parts))


def _joined(found: dict[int, Floats], parts: Sequence[NDArray[np.int64]]) -> Floats:
    return np.concatenate([found[index] for index in range(len(parts))])


def _require_finite(name: str, channels: Floats, tokens: Floats, sample_ids: NDArray[np.int64]) -> None:
    faulty = np.flatnonzero(~np.isfinite(channels).all(axis=1))
    if len(faulty):
        row = int(faulty[0])
        kind = "NaN" if np.isnan(channels[row]).any() else "infinite"
        positions = np.flatnonzero(~np.isfinite(tokens[row]))
        where = f", token {positions[0]}" if len(positions) else ""
        raise CalibrationError(
            f"{name}: its input is {kind} in calibration window {sample_ids[row]}{where}; the weights are damaged, or "
            "the computation overflowed: calibrate with --compute-dtype float32, or download the model again"
        )


def _sample_amax(states: "torch.Tensor") -> Floats:
    """Return the abs-max of each sample [samples, ...]; two reductions make no copy, as abs or a reshape would."""
    import torch

    axes = tuple(range(1, states.dim()))
    amax: Floats = torch.maximum(states.amax(axes), -states.amin(axes)).float().cpu().numpy()
    return amax


def _maxima(states: "torch.Tensor") -> tuple[Floats, Floats]:
    """Return (token maxima [samples, tokens], channel maxima [samples, channels]) of [samples, tokens, channels]."""
    import torch

    tokens, channels = (torch.maximum(states.amax(axis), -states.amin(axis)) for axis in (2, 1))
    return tokens.float().cpu().numpy(), channels.float().cpu().numpy()


def _routed_maxima(
    rows: "torch.Tensor", positions: "torch.Tensor | None", shape: tuple[int, int]
) -> tuple[Floats, Floats]:
    """Return the same of flat rows [routed, channels]; `positions` maps them to places in `shape` (None: all)."""
    import torch

    samples, length = shape
    where = torch.arange(len(rows), device=rows.device) if positions is None else positions
    tokens = torch.full((samples * length,), float("nan"), device=rows.device)
    magnitudes = rows.abs().float()
    tokens[where] = magnitudes.amax(1)
    channels = torch.zeros(samples, rows.shape[1], device=rows.device)
    for sample in range(samples):
        seen = magnitudes[where // length == sample]
        if len(seen):
            channels[sample] = seen.amax(0)
    return tokens.reshape(samples, length).cpu().numpy(), channels.cpu().numpy()


def measure_spikes(
    decoder: Decoder,
    windows: NDArray[np.int64],
    prefix: tuple[int, ...] = (),
    modules: tuple[str, ...] | None = None,
    *,
    sample_ids: NDArray[np.int64] | None = None,
    peak_stride: int = 1,
    layers: int | None = None,
    batch_tokens: int = 1,
    progress: Progress = silent,
) -> SpikeStatistics:
    """Record token and channel maxima over windows [samples, length].

    The tokens of a prefix are not in `windows` and never recorded. Windows are forwarded one at a time by default,
    so that a sample's record does not depend on its neighbours: the bits are those of any other division of the work.

    Args:
        decoder: The model.
        windows: Tokens.
        prefix: Token ids whose key/values stand before every window.
        modules: Restricts the record to the inputs of these; by default all representatives' inputs, their linears'
            outputs, the attention's operands and the layers' outputs are recorded.
        sample_ids: [samples], ascending: which of the calibration's windows these are.
        peak_stride: Outputs and attention's operands are recorded of the samples whose id it divides; 0 stands for
            the outputs, NaN for the operands of others.
        layers: Number of layers to pass; all by default.
        batch_tokens: Tokens per forward call.
        progress: Told after each layer.

    Raises:
        CalibrationError: An input was not finite; names the place.
    """
    ids = np.arange(len(windows), dtype=np.int64) if sample_ids is None else sample_ids
    parts = batches(windows, batch_tokens)
    starts = np.cumsum([len(part) for part in parts])[:-1]
    recorder = Recorder(decoder, modules, np.split(ids % peak_stride == 0, starts))
    decoder.run(windows, prefix, layers=layers, visits=(recorder.visit,), batch_tokens=batch_tokens, progress=progress)
    return recorder.statistics(parts, prefix, ids)
