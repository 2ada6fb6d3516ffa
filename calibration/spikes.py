"""Activation-spike statistics: what is recorded of each module's input, and the max-median ratio.

Source: arXiv 2405.14428, section "activation spikes", and its reference code: the ratio is formed per sample
(maximum over the lower median of the token scales) and then averaged over the samples. All in float32.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spike_export.calibration.atomic_write import atomic_path, write_text
from spike_export.calibration.errors import ArtifactError
from spike_export.calibration.recipe import ActivationRange

SPIKES_FORMAT = 1

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class ModuleSpikes:
    """What calibration saw at one module's input.

    Attributes:
        token_amax: [samples, tokens] float32; each token's abs-max over channels.
        channel_amax: [channels] float32; each channel's abs-max over all tokens of all samples.
    """

    token_amax: Floats
    channel_amax: Floats

    @property
    def amax(self) -> float:
        """Largest magnitude of the whole input; what a per-tensor quantizer scales by."""
        return float(self.token_amax.max())

    def range(self, rule: ActivationRange) -> float:
        """Return the magnitude that a static scale covers under a rule."""
        return self.amax if rule == "max" else float(self.token_amax.max(axis=1).mean(dtype=np.float64))

    @property
    def sample_ratios(self) -> Floats:
        """[samples] Maximum over lower median of the token scales, per sample."""
        lower_median = np.sort(self.token_amax, axis=1)[:, (self.token_amax.shape[1] - 1) // 2]
        # A sample whose median token is exactly zero has no scale to compare with; the floor keeps it finite.
        ratios: Floats = self.token_amax.max(axis=1) / np.maximum(lower_median, np.finfo(np.float32).tiny)
        return ratios

    @property
    def ratio(self) -> float:
        """Max-median ratio: the mean of `sample_ratios`."""
        return float(self.sample_ratios.mean(dtype=np.float64))


@dataclass(frozen=True)
class SpikeStatistics:
    """The record of one calibration pass.

    Attributes:
        modules: Representative module → its statistics, in execution order.
        token_ids: [samples, tokens] int64; the tokens that the columns of every `token_amax` belong to. Tokens of
            a prefix were fed first but are not recorded here.
        prefix_ids: The prefix that was in place; empty for none (then the first token is BOS).
    """

    modules: Mapping[str, ModuleSpikes]
    token_ids: NDArray[np.int64]
    prefix_ids: tuple[int, ...] = ()

    def ratios(self) -> dict[str, float]:
        """Max-median ratio per representative module, highest first; ties keep execution order."""
        return dict(sorted(((name, spikes.ratio) for name, spikes in self.modules.items()), key=lambda item: -item[1]))


def save_spikes(statistics: SpikeStatistics, stem: Path, description: Mapping[str, Any]) -> None:
    """Write `<stem>.safetensors` (tensors) and `<stem>.json` (ratios, top tokens, and `description`).

    The JSON file is written last: where it exists, both are complete.
    """
    from safetensors.numpy import save

    tensors: dict[str, NDArray[Any]] = {"token_ids": statistics.token_ids}
    summary: dict[str, Any] = {}
    for name, spikes in statistics.modules.items():
        tensors[f"{name}.token_amax"] = spikes.token_amax
        tensors[f"{name}.channel_amax"] = spikes.channel_amax
        sample, position = np.unravel_index(int(spikes.token_amax.argmax()), spikes.token_amax.shape)
        summary[name] = {
            "ratio": spikes.ratio,
            "amax": spikes.amax,
            "median": float(np.median(spikes.token_amax)),
            "top_token": {
                "token_id": int(statistics.token_ids[sample, position]),
                "sample": int(sample),
                "position": int(position),
            },
        }
    document = {
        "format": SPIKES_FORMAT,
        **description,
        "prefix_ids": list(statistics.prefix_ids),
        "modules": summary,
    }
    with atomic_path(stem.with_name(stem.name + ".safetensors")) as temporary:
        # Not save_file: its error on a full disk is no OSError, and its files are readable by their owner only.
        temporary.write_bytes(save(tensors))
    write_text(stem.with_name(stem.name + ".json"), json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def load_spikes(stem: Path) -> SpikeStatistics:
    """Read what `save_spikes` wrote.

    Raises:
        ArtifactError: A file is missing or damaged.
    """
    from safetensors.numpy import load_file

    try:
        document = json.loads(stem.with_name(stem.name + ".json").read_text(encoding="utf-8"))
        tensors = load_file(stem.with_name(stem.name + ".safetensors"))
        modules = {
            name: ModuleSpikes(tensors[f"{name}.token_amax"], tensors[f"{name}.channel_amax"])
            for name in document["modules"]
        }
        return SpikeStatistics(modules, tensors["token_ids"], tuple(document["prefix_ids"]))
    except Exception as error:  # damaged in any way: the remedy is the same
        raise ArtifactError(f"{stem}: cannot read the spike statistics ({error}); calibrate again") from error
