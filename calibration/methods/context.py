"""The context of a calibration: a checkpoint, its windows, and the measurements that every choice is made by."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.errors import CalibrationError
from spike_export.artifacts.progress import Progress, silent
from spike_export.artifacts.recipe import (
    SMALLEST_AMAX,
    SMOOTHED_HEAD,
    UNREACHED,
    ActivationKind,
    AttentionPlan,
    HadamardPlan,
    ModulePlan,
    Recipe,
    RotationPlan,
    SmoothingPlan,
    activation_scale,
)
from spike_export.calibration.corpus.token_windows import TokenWindows
from spike_export.calibration.decoder.equivalent.equivalent_weights import transformed_checkpoint
from spike_export.calibration.decoder.equivalent.smoothing import is_per_value_head, plan_scales, repeated_for_group
from spike_export.calibration.decoder.heap import collect_and_return_memory
from spike_export.calibration.decoder.layerwise import Decoder, Execution, Meter
from spike_export.calibration.decoder.perplexity import (
    Likelihood,
    ReferenceStates,
    Score,
    WindowScore,
    reference_states,
    total,
    window_scores,
    with_bos,
)
from spike_export.calibration.decoder.simulate import QuantizedWeights, Simulation
from spike_export.calibration.methods.head_smoothing import HeadSmoothing, choose_head_smoothing
from spike_export.calibration.methods.options import CalibrationOptions
from spike_export.calibration.methods.overflow_guard import module_dtype
from spike_export.calibration.methods.spreading import Result, Workers, window_parts
from spike_export.calibration.statistics.measure import measure_spikes
from spike_export.calibration.statistics.spikes import ModuleSpikes, SpikeStatistics, covered_range, merge_statistics
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.checkpoint.decoder_config import DecoderConfig
from spike_export.checkpoint.modules import input_sites, is_router, siblings, split_name

PEAK_STRIDE = 8
"""What only the overflow guard asks for is recorded in every eighth window: attention's operands, which norms bound,
and the outputs that enter the residual stream, whose own peak is known of every window. All windows would cost 3 % of
the pass."""

SEARCH_WINDOWS = 8
"""Most windows on which candidates are compared."""

_SEARCH_EVERY = 4
"""Every how many windows one is held out for comparing candidates, whose scales come from the other windows."""


@dataclass(frozen=True)
class Transform:
    """What is done to the weights before they are quantized; the unquantized function stays.

    Attributes:
        rotation: Of the residual stream.
        smoothing: Representative module → scales of its input's channels.
        clips: Representative module → what its static scale covers, as a multiple of the calibrated range; 1 by
            default.
        noise: Representative module → estimated noise of its quantization; empty where nothing was searched.
        token_noise: The same with a scale per token.
        hadamard: Of `down_proj`'s inputs, at run time, behind their smoothing.
        value_rotation: `o_proj` → channels of a block of the rotation of its value heads, behind their smoothing.
        input_hadamard: Input of a block, by its representative → channels of a block of the Hadamard transform that it
            passes at run time, behind its smoothing.
    """

    rotation: RotationPlan | None = None
    smoothing: Mapping[str, SmoothingPlan] = field(default_factory=dict)
    clips: Mapping[str, float] = field(default_factory=dict)
    noise: Mapping[str, float] = field(default_factory=dict)
    token_noise: Mapping[str, float] = field(default_factory=dict)
    hadamard: HadamardPlan | None = None
    value_rotation: Mapping[str, int] = field(default_factory=dict)
    input_hadamard: Mapping[str, int] = field(default_factory=dict)

    def noise_with(self, per_token: Collection[str]) -> dict[str, float]:
        """Return the noise where the representatives in `per_token` have a scale per token."""
        return {name: (self.token_noise if name in per_token else self.noise)[name] for name in self.noise}

    @classmethod
    def of(cls, recipe: Recipe) -> "Transform":
        """Return what a recipe does to the weights."""
        return cls(
            recipe.rotation,
            recipe.smoothing,
            hadamard=recipe.hadamard,
            value_rotation=recipe.value_rotation,
            input_hadamard=recipe.input_hadamard,
        )

    @property
    def of_weights(self) -> "Transform":
        """What is done to the weights alone, without clips and noise."""
        return replace(self, clips={}, noise={}, token_noise={})

    @property
    def changes_weights(self) -> bool:
        """Whether the weights are others than the checkpoint's."""
        return self.rotation is not None or self.mixes_channels or bool(self.smoothing)

    @property
    def mixes_channels(self) -> bool:
        """Whether a linear reads channels that are mixed with one another: no scales make them of those before."""
        return self.hadamard is not None or bool(self.value_rotation or self.input_hadamard)


NO_TRANSFORM = Transform()


@dataclass(frozen=True)
class Model:
    """One set of weights, ready to run: the checkpoint's, or transformed ones.

    Attributes:
        decoder: The weights in torch.
        quantized: Their INT8 form, made where needed.
    """

    decoder: Decoder
    quantized: QuantizedWeights


@dataclass(frozen=True)
class QuantizedModel:
    """A quantized model as it is simulated.

    Attributes:
        transform: What is done to the weights before they are quantized.
        plans: Precision and scale of each linear.
        attention: Steps of each attention block's operands.
        head_smoothing: Of a head in INT8.
        options: Scheme of weights and head.
    """

    transform: Transform
    plans: Mapping[str, ModulePlan]
    attention: Mapping[str, AttentionPlan]
    head_smoothing: SmoothingPlan | None
    options: CalibrationOptions


@dataclass(frozen=True)
class Calibration:
    """A checkpoint with the windows it is calibrated on; weights are read into memory on first use.

    Attributes:
        decoder: The checkpoint's own weights in torch, where they are there already.
        meter: Counts the tokens that are forwarded here, or for this calibration by its workers.
        workers: Processes that forward windows for this one; None to do it here.
    """

    checkpoint: Checkpoint
    windows: TokenWindows
    options: CalibrationOptions
    execution: Execution = Execution()
    decoder: Decoder | None = field(default=None, repr=False)
    meter: Meter = field(default_factory=Meter, repr=False)
    workers: Workers | None = field(default=None, repr=False)
    _references: dict[tuple[bytes, tuple[int, ...]], ReferenceStates] = field(default_factory=dict, repr=False)
    _perplexities: dict[tuple[int, ...], float] = field(default_factory=dict, repr=False)
    _head_smoothings: dict[RotationPlan | None, HeadSmoothing] = field(default_factory=dict, repr=False)
    _transformed: list[tuple[Transform, Model]] = field(default_factory=list, repr=False)
    _smoothed: list[tuple[Transform, QuantizedWeights]] = field(default_factory=list, repr=False)
    _column_amax: dict[str, NDArray[np.float32]] = field(default_factory=dict, repr=False)

    @cached_property
    def model(self) -> Model:
        """The checkpoint's own weights."""
        if self.decoder is not None:
            return self._ready(replace(self.decoder, meter=self.meter))
        return self._ready(Decoder(self.checkpoint, self.execution, self.meter))

    def _ready(self, decoder: Decoder) -> Model:
        return Model(decoder, QuantizedWeights(self.options.weights, keep=self.execution.resident))

    def transformed(self, transform: Transform) -> Model:
        """Return a transform's model; the last one is kept."""
        if not transform.changes_weights:
            return self.model
        transform = transform.of_weights
        if not self._transformed or self._transformed[0][0] != transform:
            self._transformed.clear()
            collect_and_return_memory()
            changed = transformed_checkpoint(self.checkpoint, transform)
            self._transformed.append((transform, self._ready(Decoder(changed, self.execution, self.meter))))
        return self._transformed[0][1]

    def with_options(self, options: CalibrationOptions) -> "Calibration":
        """Return the same model and windows with other options; what is in memory is shared, not read again."""
        if options.weights != self.options.weights:
            return replace(self, options=options, _transformed=[], _smoothed=[])
        changed = replace(self, options=options)
        if "model" in self.__dict__:
            changed.__dict__["model"] = self.model
        return changed

    def forget(self) -> None:
        """Let go of the weights in memory; they are read again when they are needed."""
        self.__dict__.pop("model", None)
        for kept in (self._references, self._transformed, self._smoothed):
            kept.clear()
        collect_and_return_memory()

    def fed(self, content: NDArray[np.int64], prefix: tuple[int, ...]) -> NDArray[np.int64]:
        """Return what the model is fed behind a prefix: the content, with BOS before it unless the prefix has it."""
        bos = self.checkpoint.bos_token_id
        return content if bos in prefix else with_bos(content, bos)

    def column_amax(self, linear: str) -> NDArray[np.float32]:
        """Return the abs-max of each column [in_features] of a linear's weight."""
        if linear not in self._column_amax:
            weight = self.checkpoint.tensor(f"{linear}.weight")
            self._column_amax[linear] = np.maximum(weight.max(axis=0), -weight.min(axis=0))
        return self._column_amax[linear]

    @cached_property
    def _several_kinds(self) -> bool:
        return len(np.unique(self.windows.kinds)) > 1

    @property
    def search_rows(self) -> NDArray[np.int64]:
        """Indices of the calibration windows that candidates are compared on: those of the first kind of text, or some
        of all where there is one kind only."""
        count = len(self.windows.calibration)
        every = _SEARCH_EVERY if count >= 2 * _SEARCH_EVERY else 1
        rows = np.flatnonzero(self.windows.kinds == 0) if self._several_kinds else np.arange(count)[::every]
        return spread(rows, SEARCH_WINDOWS)

    @property
    def scale_rows(self) -> NDArray[np.int64]:
        """Indices of the calibration windows that compared candidates take their scales from: those of all other kinds
        of text, or those that are not compared on; all where there are no others."""
        others = np.setdiff1d(np.arange(len(self.windows.calibration)), self.search_rows)
        rows = np.flatnonzero(self.windows.kinds != 0) if self._several_kinds else others
        return rows if len(rows) else self.search_rows

    @property
    def prefix_rows(self) -> NDArray[np.int64]:
        """Indices of the calibration windows that are measured behind each compared prefix.

        They are as many as the prefix is judged on; of another kind of text where there are several.
        """
        return spread(self.scale_rows, len(self.search_rows)) if self._several_kinds else self.search_rows

    @property
    def search_windows(self) -> NDArray[np.int64]:
        """[windows, tokens] The windows that candidates are compared on."""
        return self.windows.calibration[self.search_rows]

    def held_out(self, statistics: SpikeStatistics) -> SpikeStatistics:
        """Return the statistics without the search windows, so that no candidate is judged on what it was made of."""
        if np.array_equal(self.scale_rows, np.arange(len(statistics.sample_ids))):
            return statistics
        return statistics.select(self.scale_rows)

    def parts(self, statistics: SpikeStatistics) -> tuple[SpikeStatistics, ...]:
        """Return the statistics of each kind of text; of two halves, where there is one kind only.

        A calibration of one window has no parts.
        """
        kinds = self.windows.kinds if self._several_kinds else np.arange(len(self.windows.kinds)) % 2
        rows = [np.flatnonzero(kinds == kind) for kind in np.unique(kinds)]
        return tuple(statistics.select(each) for each in rows) if len(rows) > 1 else ()

    def measure(
        self, prefix: tuple[int, ...], transform: Transform = NO_TRANSFORM, progress: Progress = silent
    ) -> SpikeStatistics:
        """Record the statistics of all calibration windows behind a prefix."""
        content = self.windows.calibration
        return self.measure_windows(content, np.arange(len(content)), prefix, transform, progress)

    def measure_windows(
        self,
        content: NDArray[np.int64],
        sample_ids: NDArray[np.int64],
        prefix: tuple[int, ...],
        transform: Transform = NO_TRANSFORM,
        progress: Progress = silent,
    ) -> SpikeStatistics:
        """Record the statistics of some windows [samples, tokens] behind a prefix."""
        if self.workers is None:
            return self.measure_here(content, sample_ids, prefix, transform, progress)
        parts = self._parts(self.workers, content, prefix)
        calls = [(content[rows], sample_ids[rows], prefix, transform.of_weights) for rows in parts]
        return merge_statistics(self.workers.results(Calibration.measure_here, calls))

    def measure_here(
        self,
        content: NDArray[np.int64],
        sample_ids: NDArray[np.int64],
        prefix: tuple[int, ...],
        transform: Transform = NO_TRANSFORM,
        progress: Progress = silent,
    ) -> SpikeStatistics:
        """Record the same in this process."""
        return measure_spikes(
            self.transformed(transform).decoder,
            self.fed(content, prefix),
            prefix,
            sample_ids=sample_ids,
            peak_stride=PEAK_STRIDE if self.options.attention == "unquantized" else 1,
            progress=progress,
        )

    def _parts(self, workers: Workers, content: NDArray[np.int64], prefix: tuple[int, ...]) -> list[slice]:
        """Return each worker's windows, and count them all: a worker that is lost may forward some of them again."""
        fed = self.fed(content, prefix)
        self.count_forwarded(fed)
        return window_parts(len(fed), fed.shape[1], workers.count)

    def count_forwarded(self, fed: NDArray[np.int64]) -> None:
        """Count windows [windows, tokens] that workers forward."""
        self.meter.layers = self.checkpoint.config.num_hidden_layers
        self.meter.token_layers += fed.size * self.meter.layers

    def reference_perplexity(self, prefix: tuple[int, ...]) -> float:
        """Return the unquantized model's perplexity on the search windows behind a prefix."""
        if prefix not in self._perplexities:
            content = self.search_windows
            if self.workers is None or (content.tobytes(), prefix) in self._references:
                likelihoods = self.likelihoods_here(content, prefix)
            else:
                calls = [(content[rows], prefix) for rows in self._parts(self.workers, content, prefix)]
                likelihoods = _joined(self.workers.results(Calibration.likelihoods_here, calls))
            found = total(likelihoods).perplexity
            self._require_finite(found, "the unquantized model")
            self._perplexities[prefix] = found
        return self._perplexities[prefix]

    def likelihoods_here(self, content: NDArray[np.int64], prefix: tuple[int, ...]) -> Sequence[Likelihood]:
        """Return the unquantized model's likelihood of each window [windows, tokens], computed in this process."""
        return self.reference(content, prefix).likelihoods

    def reference(self, content: NDArray[np.int64], prefix: tuple[int, ...]) -> ReferenceStates:
        """Return what the unquantized model yields on windows [windows, tokens] behind a prefix, once computed here."""
        key = (content.tobytes(), prefix)
        if key not in self._references:
            fed = self.fed(content, prefix)
            self._references[key] = reference_states(self.model.decoder, fed, content.shape[1], prefix)
        return self._references[key]

    def _require_finite(self, perplexity: float, model: str) -> None:
        """Refuse to choose by figures that say nothing: NaN, or beyond what a float holds."""
        if not math.isfinite(perplexity):
            raise CalibrationError(
                f"{self.checkpoint.name}: the perplexity of {model} is {perplexity} on the calibration windows; the "
                "weights are damaged or the logits overflow: check the checkpoint's weights and scaling factors"
            )

    def head_smoothing(self, rotation: RotationPlan | None) -> HeadSmoothing:
        """Return the smoothing of the head's input; none for a head that does not round it, or with smoothing off.

        Chosen without a prefix, which hardly changes the states that the head reads. The scales come from as many
        other windows as there are to compare candidates on.
        """
        if self.options.head != SMOOTHED_HEAD or not self.options.smoothing:
            return HeadSmoothing()
        if rotation not in self._head_smoothings:
            content, judging, others = self.windows.calibration, self.search_rows, self.scale_rows
            made_of = others[:: max(1, len(others) // len(judging))][: len(judging)]
            decoder, length = self.transformed(Transform(rotation=rotation)).decoder, content.shape[1]
            reference = self.reference(self.search_windows, ())
            if rotation is not None:
                reference = reference_states(decoder, self.fed(self.search_windows, ()), length, ())
            windows = self.fed(content[made_of], ())
            self._head_smoothings[rotation] = choose_head_smoothing(decoder, windows, length, reference)
        return self._head_smoothings[rotation]

    def predicted(
        self,
        statistics: SpikeStatistics,
        kept: tuple[str, ...],
        transform: Transform,
        *,
        per_token: Collection[str] = (),
        measured: bool = False,
        compare: bool = True,
    ) -> Score:
        """Return perplexity and divergence on the search windows with all but `kept` (representatives) quantized.

        Args:
            statistics: Behind the prefix that they name. Of the model before smoothing and Hadamard transform (with a
                rotation: of the rotated one), or, if `measured`, of the transformed model.
            kept: Representatives that are not quantized.
            transform: What is done to the weights.
            per_token: Representatives whose tokens have each a scale of their own.
            measured: Of which of the two models the statistics are.
            compare: Whether to measure the divergence too.
        """
        scales = channel_scales(transform, self.checkpoint.config)
        if transform.changes_weights and self._needs_weights_of(transform) and not measured:
            # The steps of these values follow from no statistics of the model before.
            statistics, measured = self._measured_again(statistics, transform), True
        plans = module_plans(statistics, kept, transform, self.options, None if measured else scales, per_token)
        head = self.head_smoothing(transform.rotation).plan
        attention = attention_plans(statistics, self.options)
        model = QuantizedModel(transform.of_weights, plans, attention, head, self.options)
        found = Score.of(self._scores(model, statistics.prefix_ids, compare))
        self._require_finite(found.perplexity, "the quantized model")
        return found

    def _scores(self, model: QuantizedModel, prefix: tuple[int, ...], compare: bool) -> Sequence[WindowScore]:
        content = self.search_windows
        if compare:
            self.reference_perplexity(prefix)  # refuses a model that there is nothing to compare with
        if self.workers is None:
            return self.scores_here(content, prefix, model, compare)
        parts = self._parts(self.workers, content, prefix)
        calls = [(content[rows], prefix, model, compare) for rows in parts]
        return _joined(self.workers.results(Calibration.scores_here, calls))

    def scores_here(
        self, content: NDArray[np.int64], prefix: tuple[int, ...], model: QuantizedModel, compare: bool
    ) -> Sequence[WindowScore]:
        """Return a quantized model's score on each window [windows, tokens] behind a prefix, computed in this process.

        Args:
            content: The windows.
            prefix: Token ids before each of them.
            model: What is simulated.
            compare: Whether to measure the divergence too.
        """
        own = self if model.options == self.options else self.with_options(model.options)
        decoder, simulation = own._simulation(model)
        return window_scores(
            decoder,
            self.fed(content, prefix),
            content.shape[1],
            prefix,
            (simulation.visit,),
            head=model.options.head,
            head_smoothing=model.head_smoothing,
            reference=self.reference(content, prefix) if compare else None,
        )

    def _needs_weights_of(self, transform: Transform) -> bool:
        """Whether a simulation needs the transformed weights themselves: smoothing at the linears' inputs is not all.

        Attention's value operand is what v_proj writes, divided by o_proj's scales: smoothing at o_proj's input alone
        would leave it as it was. Hadamard transforms come behind the smoothing of the same input.
        """
        return self.options.attention != "unquantized" or transform.mixes_channels

    def _measured_again(self, statistics: SpikeStatistics, transform: Transform) -> SpikeStatistics:
        """Return statistics of the same windows behind the same prefix, of the transformed model."""
        rows = statistics.sample_ids
        return self.measure_windows(self.windows.calibration[rows], rows, statistics.prefix_ids, transform)

    def _simulation(self, model: QuantizedModel) -> tuple[Decoder, Simulation]:
        """Return the decoder to run and what to simulate in it.

        Smoothing needs no weights of its own in memory where every linear's row has a scale of its own, and nothing but
        linears is quantized.
        """
        transform, scales = model.transform, channel_scales(model.transform, self.checkpoint.config)
        if not scales or self._needs_weights_of(transform) or self.options.weights == "int8-per-tensor":
            own = self.transformed(transform)
            return own.decoder, Simulation(model.plans, own.quantized, model.attention)
        if not self._smoothed or self._smoothed[0][0] != transform:
            self._smoothed[:] = [(transform, QuantizedWeights(self.options.weights, keep=self.execution.resident))]
        rotated = self.transformed(Transform(rotation=transform.rotation))
        readers = {reader: factors for name, factors in scales.items() for reader in siblings(name)}
        return rotated.decoder, Simulation(model.plans, self._smoothed[0][1], model.attention, readers)


def _joined(parts: Sequence[Sequence[Result]]) -> list[Result]:
    """Return what the workers found, window after window."""
    return [each for part in parts for each in part]


def spread(rows: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Return at most `most` of the rows [rows, ...], evenly spaced."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(np.int64))]


def channel_scales(transform: Transform, config: DecoderConfig) -> dict[str, NDArray[np.float32]]:
    """Return representative module → scales of its input channels, for all inputs that a transform smooths."""
    found: dict[str, NDArray[np.float32]] = {}
    sites = input_sites(config)
    for name, plan in transform.smoothing.items():
        layer, inner = split_name(name)
        site = next(each for each in sites if each.representative == inner)
        scales = plan_scales(plan)
        if is_per_value_head(site):
            scales = repeated_for_group(scales, config)
        # Inputs behind one norm share its scales.
        sharing = [each for each in sites if each.producer == site.producer]
        found |= {f"model.layers.{layer}.{each.representative}": scales for each in sharing}
    return found


def module_plans(
    statistics: SpikeStatistics,
    kept: tuple[str, ...],
    transform: Transform,
    options: CalibrationOptions,
    smoothed: Mapping[str, NDArray[np.float32]] | None = None,
    per_token: Collection[str] = (),
) -> dict[str, ModulePlan]:
    """Return every linear's plan: precision, scale, and what calibration saw.

    Args:
        statistics: Of the transformed model, or of the model before smoothing.
        kept: Representatives that are not quantized.
        transform: Clips and noise.
        options: Scheme, range rule and precision of what is kept.
        smoothed: `channel_scales` of the transform, by which the statistics' ranges still have to be divided; None
            where the statistics are of the transformed model.
        per_token: Representatives whose tokens have each a scale of their own; all, where the options say so.
    """
    plans: dict[str, ModulePlan] = {}
    noise = transform.noise_with(per_token)
    for name, spikes in statistics.modules.items():
        clip = transform.clips.get(name, 1.0)
        if is_router(name):
            plan = ModulePlan(precision="float32", ratio=spikes.ratio, reason="router")
        elif name in kept:
            plan = _kept_plan(spikes, options)
        else:
            kind: ActivationKind = "per-token" if name in per_token else options.searched_activations
            plan = _int8_plan(spikes, kind, clip, options, (smoothed or {}).get(name))
        seen = {"noise": noise.get(name), "clip": clip if clip != 1 and plan.activation_scale else None}
        plans.update(dict.fromkeys(siblings(name), plan.model_copy(update=seen)))
    return plans


def _kept_plan(spikes: ModuleSpikes, options: CalibrationOptions) -> ModulePlan:
    dtype, guard = module_dtype(options.dtype, spikes.peak)
    reason = "score > alpha" if guard is None else f"score > alpha; {guard}"
    return ModulePlan(precision=dtype, weights=_kept_weights(options), ratio=spikes.ratio, reason=reason)


def _kept_weights(options: CalibrationOptions) -> Literal["int8"] | None:
    return "int8" if options.searched_kept_weights == "int8" else None


def _int8_plan(
    spikes: ModuleSpikes,
    kind: ActivationKind,
    clip: float,
    options: CalibrationOptions,
    factors: NDArray[np.float32] | None,
) -> ModulePlan:
    """Return the plan of a quantized input; `factors` divide its channels, where the statistics do not know of them."""
    if not spikes.reached:
        if options.activations != "static":
            return ModulePlan(precision="int8", activations="per-token")  # needs nothing that calibration sees
        # Neither its scale nor its peak is known: only float32 holds whatever may come.
        return ModulePlan(precision="float32", weights=_kept_weights(options), reason=UNREACHED)
    rule = options.activation_range
    covered = spikes.range(rule) if factors is None else spikes.smoothed_range(factors, rule)
    return ModulePlan(
        precision="int8",
        activations=kind,
        activation_scale=activation_scale(clip * covered),
        # The search compares many plans and has no use for it.
        activation_amax=max(spikes.range("max"), SMALLEST_AMAX) if factors is None else None,
        ratio=spikes.ratio,
    )


def attention_plans(statistics: SpikeStatistics, options: CalibrationOptions) -> dict[str, AttentionPlan]:
    """Return every attention block's steps; empty where attention's products are not quantized."""
    if options.attention == "unquantized":
        return {}
    rule = options.activation_range
    plans = {}
    for name, amax in statistics.operand_amax.items():
        query, key, value = (activation_scale(covered_range(amax[:, column], rule)) for column in range(3))
        plans[name] = AttentionPlan(query=query, key=key, value=value)
    return plans
