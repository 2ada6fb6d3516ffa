"""One calibration pass: forward the windows and record every representative module's input."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from spike_export.calibration.progress import Progress, silent
from spike_export.calibration.reference_model import ReferenceModel, batches
from spike_export.calibration.spikes import Floats, ModuleSpikes, SpikeStatistics

if TYPE_CHECKING:
    import torch


class _Recorder:
    """Collects token and channel maxima of the modules it observes."""

    def __init__(self) -> None:
        self.token_amax: dict[str, list[Floats]] = {}
        self.channel_amax: dict[str, torch.Tensor] = {}

    def __call__(self, module: str, inputs: "torch.Tensor") -> None:
        magnitude = inputs.detach().float().abs()  # [batch, length, channels]
        self.token_amax.setdefault(module, []).append(magnitude.amax(dim=-1).numpy())
        channels = magnitude.amax(dim=(0, 1))
        known = self.channel_amax.get(module)
        self.channel_amax[module] = channels if known is None else known.maximum(channels)

    def statistics(self, windows: NDArray[np.int64], prefix_ids: tuple[int, ...]) -> SpikeStatistics:
        modules = {
            name: ModuleSpikes(np.concatenate(amax), self.channel_amax[name].numpy())
            for name, amax in self.token_amax.items()
        }
        return SpikeStatistics(modules, windows, prefix_ids)


def measure_spikes(
    model: ReferenceModel,
    windows: NDArray[np.int64],
    prefix_ids: tuple[int, ...] = (),
    modules: tuple[str, ...] | None = None,
    progress: Progress = silent,
) -> SpikeStatistics:
    """Record token and channel maxima over windows [samples, length].

    A prefix is already in `model` as key/values, so its own positions are never recorded; `prefix_ids` only names it.
    `modules` restricts the record; by default all representatives are observed.
    """
    recorder = _Recorder()
    done = 0
    with model.observed(recorder, modules):
        for batch in batches(windows):
            model.hidden_states(batch)
            done += len(batch)
            progress("windows", done, len(windows))
    return recorder.statistics(windows, prefix_ids)
