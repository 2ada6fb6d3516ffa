"""Activation-spike statistics: what is recorded of each module's input, and the max-median ratio.

Source: arXiv 2405.14428, section "activation spikes", and its reference code: the ratio is formed per sample
(maximum over the lower median of the token scales) and then averaged over the samples. All in float32.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.errors import ArtifactError, one_line
from spike_export.artifacts.files.atomic_write import atomic_path, write_text
from spike_export.artifacts.files.documents import require_file
from spike_export.artifacts.recipe import ActivationRange
from spike_export.calibration.statistics.description import load_description
from spike_export.calibration.statistics.quantile_sketch import QuantileSketch

SPIKES_FORMAT = 2

Floats = NDArray[np.float32]

PERCENTILE = 0.999
"""Share of the tokens whose largest magnitude the rule `percentile` covers."""


@dataclass(frozen=True)
class ModuleSpikes:
    """What calibration saw at one module's input.

    Attributes:
        token_amax: [samples, tokens] float32; each token's abs-max over channels. NaN where a mixture of experts'
            router did not send the token to this expert.
        sample_channel_amax: [samples, channels] float32; each channel's abs-max over one sample's tokens. With it the
            ranges after any scaling of the channels are known without another pass.
        output_amax: [samples] float32; abs-max of what the linears yield that write the residual stream (`o_proj`,
            `down_proj`); 0 elsewhere, where operands and the next input tell the peaks, and where not recorded.
    """

    token_amax: Floats
    sample_channel_amax: Floats
    output_amax: Floats

    @property
    def reached(self) -> bool:
        """Whether any token came here; a mixture's router may have sent an expert none."""
        return not bool(np.isnan(self.token_amax).all())

    @property
    def amax(self) -> float:
        """Largest magnitude of the whole input; what a per-tensor quantizer scales by."""
        return float(self.sample_amax.max())

    @property
    def sample_amax(self) -> Floats:
        """[samples] Largest magnitude of each sample; 0 where no token of the sample came here."""
        amax: Floats = np.nan_to_num(self.token_amax, nan=0.0).max(axis=1)
        return amax

    @property
    def channel_amax(self) -> Floats:
        """[channels] Each channel's abs-max over all tokens of all samples."""
        amax: Floats = self.sample_channel_amax.max(axis=0)
        return amax

    @property
    def peak(self) -> float:
        """Largest magnitude of inputs and outputs: what a 16-bit product has to hold."""
        return max(self.amax, float(self.output_amax.max()))

    def range(self, rule: ActivationRange) -> float:
        """Return the magnitude that a static scale covers under a rule; for `mse`, what its clips are shares of."""
        seen = self.token_amax[~np.isnan(self.token_amax)]
        if rule == "percentile" and seen.size:
            return float(np.quantile(seen, PERCENTILE))
        return covered_range(self.sample_amax, rule)

    def smoothed_range(self, scales: Floats, rule: ActivationRange) -> float:
        """Return `range` of the input divided by `scales` [channels].

        Exact, but for `percentile`: of its tokens only the channels' maxima are known, and the largest is returned.
        """
        return covered_range((self.sample_channel_amax / scales).max(axis=1), rule)

    @property
    def token_ratios(self) -> Floats:
        """[samples, tokens] Each token scale over its sample's lower median; NaN where the token did not come here."""
        tokens = (~np.isnan(self.token_amax)).sum(axis=1)
        ordered = np.sort(self.token_amax, axis=1)  # NaN goes to the end
        lower_median = ordered[np.arange(len(ordered)), np.maximum(tokens - 1, 0) // 2]
        # A sample whose median token is exactly zero has no scale to compare with; the floor keeps it finite.
        ratios: Floats = self.token_amax / np.maximum(lower_median, np.finfo(np.float32).tiny)[:, None]
        return ratios

    @property
    def sample_ratios(self) -> Floats:
        """[samples seen] Maximum over lower median of the token scales, per sample that has tokens here."""
        ratios: Floats = np.fmax.reduce(self.token_ratios, axis=1)
        return ratios[~np.isnan(ratios)]

    @property
    def ratio(self) -> float:
        """Max-median ratio: the mean of `sample_ratios`; 1 where no token came here."""
        ratios = self.sample_ratios
        return float(ratios.mean(dtype=np.float64)) if len(ratios) else 1.0

    @property
    def sketch(self) -> QuantileSketch:
        """Distribution of the token scales."""
        return QuantileSketch.of(self.token_amax[~np.isnan(self.token_amax)])


def covered_range(sample_amax: Floats, rule: ActivationRange) -> float:
    """Return the magnitude that a static scale covers, of the samples' largest magnitudes [samples].

    Samples without a token at the module (0, in a mixture of experts) say nothing about its scale.
    """
    seen = sample_amax[sample_amax > 0]
    if not len(seen):
        return 0.0
    return float(seen.mean(dtype=np.float64)) if rule == "sample-mean" else float(seen.max())


@dataclass(frozen=True, slots=True)
class TopToken:
    """A token with a large scale: its abs-max at a module's input, its id, and where it stood."""

    amax: float
    token_id: int
    sample: int
    position: int


@dataclass(frozen=True)
class SpikeStatistics:
    """The record of some of a calibration's samples; records of disjoint samples merge, in any order and grouping.

    Attributes:
        modules: Representative module → its statistics, in execution order.
        token_ids: [samples, tokens] int64; the tokens that the columns of every `token_amax` belong to. Tokens of
            a prefix were fed first but are not recorded here.
        prefix_ids: The prefix that was in place; empty for none (then the first token is BOS).
        sample_ids: [samples] int64, ascending; which of the calibration's windows these are. Counted from 0 by
            default.
        hidden_amax: [samples, layers] float32; abs-max of each decoder layer's output.
        operand_amax: Attention block → [samples, 3] float32; abs-max of its query, key and value after rope; NaN
            where they were not recorded.
    """

    modules: Mapping[str, ModuleSpikes]
    token_ids: NDArray[np.int64]
    prefix_ids: tuple[int, ...] = ()
    sample_ids: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    hidden_amax: Floats = field(default_factory=lambda: np.empty((0, 0), np.float32))
    operand_amax: Mapping[str, Floats] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Count the samples where nobody did, and refuse what cannot be merged."""
        if not len(self.sample_ids):
            object.__setattr__(self, "sample_ids", np.arange(len(self.token_ids), dtype=np.int64))
        if not (np.diff(self.sample_ids) > 0).all():
            raise ValueError("sample ids must ascend")

    def ratios(self) -> dict[str, float]:
        """Max-median ratio per representative module, highest first; ties keep execution order."""
        return dict(sorted(((name, spikes.ratio) for name, spikes in self.modules.items()), key=lambda item: -item[1]))

    def select(self, rows: NDArray[np.int64]) -> "SpikeStatistics":
        """Return the record of some samples; `rows` are indices into this record, ascending."""
        modules = {
            name: ModuleSpikes(spikes.token_amax[rows], spikes.sample_channel_amax[rows], spikes.output_amax[rows])
            for name, spikes in self.modules.items()
        }
        operands = {name: amax[rows] for name, amax in self.operand_amax.items()}
        ids, hidden = self.sample_ids[rows], self.hidden_amax[rows]
        return SpikeStatistics(modules, self.token_ids[rows], self.prefix_ids, ids, hidden, operands)

    def top_tokens(self, module: str, count: int) -> list[TopToken]:
        """Return the tokens with the largest scales at a module, largest first, ties by sample and position."""
        amax = np.nan_to_num(self.modules[module].token_amax, nan=-1.0)
        order = np.argsort(-amax, axis=None, kind="stable")[:count]
        return [
            TopToken(float(amax[row, column]), int(self.token_ids[row, column]), int(self.sample_ids[row]), int(column))
            for row, column in (divmod(int(flat), amax.shape[1]) for flat in order)
            if amax[row, column] >= 0
        ]


def merge_statistics(parts: Sequence[SpikeStatistics]) -> SpikeStatistics:
    """Return the record of all parts' samples, ordered by sample: the same for any order and grouping of the parts.

    Raises:
        ArtifactError: The parts overlap, or were taken of different modules, lengths or prefixes.
    """
    first = parts[0]
    for part in parts[1:]:
        if list(part.modules) != list(first.modules) or part.prefix_ids != first.prefix_ids:
            raise ArtifactError("spike statistics of different models or prefixes cannot be merged; calibrate again")
        if part.token_ids.shape[1] != first.token_ids.shape[1]:
            raise ArtifactError("spike statistics of windows of different lengths cannot be merged; give one --length")
    ids = np.concatenate([part.sample_ids for part in parts])
    order = np.argsort(ids, kind="stable")
    repeated = ids[order][1:][np.diff(ids[order]) == 0]
    if len(repeated):
        raise ArtifactError(f"window {repeated[0]} is in more than one of the spike statistics; merge each shard once")

    def joined(arrays: Iterable[NDArray[Any]]) -> Any:
        return np.concatenate(list(arrays))[order]

    modules = {
        name: ModuleSpikes(
            joined(part.modules[name].token_amax for part in parts),
            joined(part.modules[name].sample_channel_amax for part in parts),
            joined(part.modules[name].output_amax for part in parts),
        )
        for name in first.modules
    }
    return SpikeStatistics(
        modules,
        joined(part.token_ids for part in parts),
        first.prefix_ids,
        ids[order],
        joined(part.hidden_amax for part in parts),
        {name: joined(part.operand_amax[name] for part in parts) for name in first.operand_amax},
    )


TOP_TOKENS = 8
"""Tokens per module that the summary names."""

QUANTILES = (0.5, 0.9, 0.99, 0.999)
"""Quantiles of the token scales that the summary holds."""

_ARRAYS = ("token_amax", "sample_channel_amax", "output_amax")


def save_spikes(
    statistics: SpikeStatistics,
    stem: Path,
    description: Mapping[str, Any],
    decode: Callable[[int], str] = lambda token: "",
) -> None:
    """Write `<stem>.safetensors` (tensors) and `<stem>.json` (ratios, quantiles, top tokens, and `description`).

    The JSON file is written last: where it exists, both are complete. `decode` gives a token's text.
    """
    from safetensors.numpy import save

    tensors: dict[str, NDArray[Any]] = {
        "token_ids": statistics.token_ids,
        "sample_ids": statistics.sample_ids,
        "hidden_amax": statistics.hidden_amax,
    }
    for name, operands in statistics.operand_amax.items():
        tensors[f"{name}.operand_amax"] = operands
    for name, spikes in statistics.modules.items():
        for array in _ARRAYS:
            tensors[f"{name}.{array}"] = getattr(spikes, array)
    document = {
        "format": SPIKES_FORMAT,
        **description,
        "prefix_ids": list(statistics.prefix_ids),
        "hidden_amax": statistics.hidden_amax.max(axis=0).tolist() if statistics.hidden_amax.size else [],
        "attentions": list(statistics.operand_amax),
        "modules": {name: _summary(statistics, name, decode) for name in statistics.modules},
    }
    with atomic_path(stem.with_name(stem.name + ".safetensors")) as temporary:
        # Not save_file: its error on a full disk is no OSError, and its files are readable by their owner only.
        temporary.write_bytes(save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}))
    write_text(stem.with_name(stem.name + ".json"), json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def _summary(statistics: SpikeStatistics, name: str, decode: Callable[[int], str]) -> dict[str, Any]:
    spikes = statistics.modules[name]
    sketch = spikes.sketch
    return {
        "ratio": spikes.ratio,
        "amax": spikes.amax,
        "output_amax": float(spikes.output_amax.max()),
        "tokens": sketch.count,
        "quantiles": {str(share): sketch.quantile(share) for share in QUANTILES} if sketch.count else {},
        "top_tokens": [
            {**asdict(token), "text": decode(token.token_id)} for token in statistics.top_tokens(name, TOP_TOKENS)
        ],
    }


def load_spikes(stem: Path) -> SpikeStatistics:
    """Read what `save_spikes` wrote.

    Raises:
        ArtifactError: A file is missing or damaged.
    """
    from safetensors.numpy import load_file

    description = load_description(stem)
    path = stem.with_name(stem.name + ".safetensors")
    try:
        require_file(path)
        tensors = load_file(path)
        modules = {
            name: ModuleSpikes(*(tensors[f"{name}.{array}"] for array in _ARRAYS)) for name in description.modules
        }
        operands = {name: tensors[f"{name}.operand_amax"] for name in description.attentions}
        statistics = SpikeStatistics(
            modules,
            tensors["token_ids"],
            description.prefix_ids,
            tensors["sample_ids"],
            tensors["hidden_amax"],
            operands,
        )
        _require_consistent(statistics)
    except Exception as error:  # damaged in any way: the remedy is the same
        raise ArtifactError(f"{stem}: cannot read the spike statistics ({one_line(error)}); calibrate again") from error
    return statistics


def _require_consistent(statistics: SpikeStatistics) -> None:
    """Refuse arrays whose types or shapes contradict each other.

    Raises:
        ValueError: Names the first of them.
    """
    if statistics.token_ids.ndim != 2 or not statistics.token_ids.size:
        raise ValueError(f"token_ids have shape {list(statistics.token_ids.shape)}")
    samples, tokens = statistics.token_ids.shape
    wanted: list[tuple[str, NDArray[Any], str, tuple[int | None, ...]]] = [
        ("token_ids", statistics.token_ids, "int64", (samples, tokens)),
        ("sample_ids", statistics.sample_ids, "int64", (samples,)),
    ]
    if statistics.hidden_amax.size:
        wanted.append(("hidden_amax", statistics.hidden_amax, "float32", (samples, None)))
    wanted += [
        (f"{name}.operand_amax", amax, "float32", (samples, 3)) for name, amax in statistics.operand_amax.items()
    ]
    for name, spikes in statistics.modules.items():
        shapes: tuple[tuple[int | None, ...], ...] = ((samples, tokens), (samples, None), (samples,))
        wanted += [
            (f"{name}.{array}", getattr(spikes, array), "float32", shape)
            for array, shape in zip(_ARRAYS, shapes, strict=True)
        ]
    for name, array, dtype, shape in wanted:
        fits = len(array.shape) == len(shape) and all(b in (None, a) for a, b in zip(array.shape, shape, strict=True))
        if not fits or array.dtype != dtype or not array.size:
            raise ValueError(f"{name} is {array.dtype} {list(array.shape)}")
