"""The search for each input's smoothing and clipping: the scales with the least noise, one layer at a time.

At every input of a layer the candidates (a formula and its parameter, and how much of the input's range the static
scale covers) are compared by what INT8 does to the linears that read it: their output's error on held-out windows.
Errors are weighted by the token's residual stream, because the next norm divides by it: a spike's own token counts no
more than any other.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.recipe import (
    QMAX,
    SMALLEST_AMAX,
    ActivationKind,
    ActivationRange,
    SmoothingPlan,
    WeightScheme,
)
from spike_export.calibration.decoder.equivalent.hadamard import transform_channels
from spike_export.calibration.decoder.equivalent.smoothing import (
    Form,
    is_per_value_head,
    plan_scales,
    repeated_for_group,
    shared_by_group,
    smoothing_plan,
    smoothing_scales,
)
from spike_export.calibration.decoder.layers.routing import routed_positions
from spike_export.calibration.decoder.simulate import fake_quantize, fake_quantize_tokens
from spike_export.calibration.decoder.weight_quantization import quantize_weight
from spike_export.calibration.methods.range_margin import range_margin
from spike_export.calibration.statistics.spikes import ModuleSpikes, SpikeStatistics, covered_range
from spike_export.checkpoint.decoder_config import DecoderConfig
from spike_export.checkpoint.modules import InputSite, block_inputs, input_sites, is_down_projection, is_router

if TYPE_CHECKING:
    import torch
    from torch import nn

Floats = NDArray[np.float32]

CANDIDATES: tuple[tuple[Form, float], ...] = (
    ("smoothquant", 0.5),
    ("smoothquant", 0.6),
    ("smoothquant", 0.7),
    ("smoothquant", 0.8),
    ("smoothquant", 0.9),
    ("outlier-suppression", 0.25),
    ("outlier-suppression", 0.1),
    ("smoothquant-typical", 0.4),
)
"""Formulas and parameters that compete, besides no smoothing at all."""

CLIPS = (1.0, 0.8, 0.6, 0.45, 0.3, 0.2)
"""Shares of the calibrated range that a static scale may cover; what lies beyond saturates."""

FLOOR_QUANTILE = 0.5
"""Channels count as at least as large as this quantile of them. A channel that was quiet in calibration would get a
small scale, and would burst the range when it speaks up later."""

_ROWS = 1024
"""Tokens on which candidates are compared."""


@dataclass(frozen=True)
class TokenChoice:
    """The best candidate of one input whose tokens have each a scale of their own; attributes as in `SiteChoice`."""

    smoothing: SmoothingPlan | None
    final: SmoothingPlan | None
    noise: float
    block: int | None = None


@dataclass(frozen=True)
class SiteChoice:
    """The best candidate of one input.

    Attributes:
        smoothing: Its scales as they were compared, or None for none. For the inputs behind one norm they are the same.
        final: The same form and parameter made of all windows: more of them say better where the outliers are.
        clip: What the static scale covers, as a multiple of the calibrated range: a share, or more than 1 for a margin.
        noise: Mean over tokens of the squared error that INT8 adds here to the residual stream, relative to the
            stream; estimated to first order.
        tokens: What is best where each token has a scale of its own.
        block: Channels of a block of the Hadamard transform that the choice is behind, at an input where the choice is
            the search's: of the value heads, or at run time of what a block reads; None for none.
        transformed: What is best where the input may pass a Hadamard transform at run time; None where it may not.
    """

    smoothing: SmoothingPlan | None
    final: SmoothingPlan | None
    clip: float
    noise: float
    tokens: TokenChoice
    block: int | None = None
    transformed: "SiteChoice | None" = None


def default_smoothing(
    statistics: SpikeStatistics, config: DecoderConfig, weight_amax: Callable[[str], Floats], rotated: bool
) -> dict[str, SmoothingPlan]:
    """Return plans with fixed strengths, without a search: 0.65, and 0.5 for attention's output.

    Args:
        statistics: Of the model that is to be smoothed.
        config: The decoder.
        weight_amax: Linear's name → abs-max of its weight's columns [in_features].
        rotated: Whether a rotation takes the place of the norms' smoothing.
    """
    plans = {}
    for index in range(config.num_hidden_layers):
        for group in _groups(config):
            if group[0].producer is None or (rotated and group[0].behind_norm):
                continue
            names = [f"model.layers.{index}.{site.representative}" for site in group]
            readers = [f"model.layers.{index}.{reader}" for site in group for reader in site.readers]
            inputs = np.max([statistics.modules[name].channel_amax for name in names], axis=0)
            weights = np.max([weight_amax(reader) for reader in readers], axis=0)
            strength = 0.5 if is_per_value_head(group[0]) else 0.65
            plans[names[0]] = _plan("smoothquant", strength, inputs, weights, group[0], config)
    return plans


def _groups(config: DecoderConfig) -> list[list[InputSite]]:
    """Return the inputs of a layer, those of one norm together: they share its scales."""
    groups: dict[str, list[InputSite]] = {}
    for site in input_sites(config):
        groups.setdefault((site.behind_norm and site.producer) or site.representative, []).append(site)
    return list(groups.values())


def _plan(
    form: Form, parameter: float, inputs: Floats, weights: Floats, site: InputSite, config: DecoderConfig
) -> SmoothingPlan:
    if is_per_value_head(site):
        inputs, weights = shared_by_group(inputs, config), shared_by_group(weights, config)
    floored = np.maximum(inputs, np.quantile(inputs, FLOOR_QUANTILE))
    return smoothing_plan(form, parameter, smoothing_scales(form, parameter, floored, weights))


def input_scales(plan: SmoothingPlan | None, site: InputSite, config: DecoderConfig, channels: int) -> Floats:
    """Return the scale of each of a site's input channels."""
    if plan is None:
        return np.ones(channels, np.float32)
    scales = plan_scales(plan)
    return repeated_for_group(scales, config) if is_per_value_head(site) else scales


@dataclass
class SmoothingSearch:
    """Visits a decoder's layers and searches each layer's inputs when its windows have passed.

    Attributes:
        config: The decoder's.
        statistics: Of the same model behind the same prefix, of all windows.
        compared: Those without the windows that pass: of what candidates are made, so that none is judged on its own.
        weights: How INT8 weights are scaled.
        activations: How INT8 activations are scaled.
        activation_range: What static scales cover; for `mse` the clips compete too, and the mean of the samples' maxima
            gets a margin.
        smoothing: Whether scales may be moved.
        rotated: Whether a rotation takes the place of the norms' smoothing.
        stride: Every how many tokens one is looked at.
        windows: How many windows pass.
        hadamard: Channels of a block of the Hadamard transform that the inputs of `down_proj` are judged behind, too;
            None to leave that out.
        input_block: Channels of a block of the Hadamard transform that may stand in front of a block's linears; None to
            leave that out.
        value_block: Channels of a block of the rotation of the value heads that competes at the inputs of `o_proj`;
            None for no rotation.
        parts: The statistics of each kind of text, or of other parts of the calibration, between which margins are
            found; none for no margin.
        layers: Those whose inputs are searched, of all that pass; None for all.
        choices: Representative module → what was found; filled by the visits.
    """

    config: DecoderConfig
    statistics: SpikeStatistics
    compared: SpikeStatistics
    weights: WeightScheme
    activations: ActivationKind
    activation_range: ActivationRange
    smoothing: bool
    rotated: bool
    stride: int
    windows: int = 1
    hadamard: int | None = None
    input_block: int | None = None
    value_block: int | None = None
    parts: Sequence[SpikeStatistics] = ()
    layers: slice | None = None
    choices: dict[str, SiteChoice] = field(default_factory=dict)

    @staticmethod
    def stride_of(tokens: int) -> int:
        """Return the stride that looks at about a thousand of `tokens` tokens."""
        return max(1, tokens // _ROWS)

    @contextmanager
    def visit(self, index: int, layer: "nn.Module") -> "Iterator[None]":
        """Within the block the layer's windows pass; at its end its inputs are searched."""
        if self.layers and not self.layers.start <= index < self.layers.stop:
            yield
            return
        seen = _Rows(layer, self.stride)
        added = _added(self.config)
        handles = [
            *(seen.watch_input(site.representative) for site in input_sites(self.config)),
            *(seen.watch_output(name) for name in {*added, *added.values()}),
            layer.register_forward_hook(seen.hidden_hook),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        attention, feed_forward = added
        for group in _groups(self.config):
            block = attention if "attn" in group[0].representative else feed_forward
            self._search(index, layer, group, seen, _Branch(block, added[block] != block, seen.share(added[block])))

    def _search(
        self, index: int, layer: "nn.Module", group: Sequence[InputSite], seen: "_Rows", branch: "_Branch"
    ) -> None:
        names = {site.representative: f"model.layers.{index}.{site.representative}" for site in group}
        sites = [
            _Site(
                site,
                self.compared.modules[names[site.representative]],
                tuple(part.modules[names[site.representative]] for part in self.parts),
                _weight(layer, site),
                seen,
                branch,
            )
            for site in group
            if not is_router(site.representative) and site.representative in seen.inputs
        ]
        found = [
            {names[site.site.representative]: site.judged(plans, self) for site in sites}
            for plans in self._plans(group, layer, names)
        ]
        best = min(found, key=lambda choices: sum(choice.noise for choice in choices.values()))
        if sum(not is_router(site.representative) for site in group) == 1:
            # Several inputs share the scales of a norm, whatever the kinds of their own scales.
            best = {name: _best_with_transformed([choices[name] for choices in found]) for name in best}
        self.choices |= best

    def _plans(self, group: Sequence[InputSite], layer: "nn.Module", names: Mapping[str, str]) -> "Iterator[_Plans]":
        yield _Plans(None, None, (None,) * len(self.parts))
        site = group[0]
        if not self.smoothing or site.producer is None or (self.rotated and site.behind_norm):
            return
        columns = {
            form: np.max([_column_magnitudes(form, _weight(layer, site)) for site in group], axis=0)
            for form in dict(CANDIDATES)
        }
        for form, parameter in CANDIDATES:
            inputs = (
                np.max([_channel_magnitudes(form, statistics.modules[name]) for name in names.values()], axis=0)
                for statistics in (self.compared, self.statistics, *self.parts)
            )
            compared, final, *parts = (
                _plan(form, parameter, each, columns[form], site, self.config) for each in inputs
            )
            yield _Plans(compared, final, tuple(parts))


class _Plans(NamedTuple):
    """One candidate: as it is compared, made of all windows, and made of each part of them."""

    compared: SmoothingPlan | None
    final: SmoothingPlan | None
    parts: tuple[SmoothingPlan | None, ...] = ()

    @property
    def kept(self) -> tuple[SmoothingPlan | None, SmoothingPlan | None]:
        """The two that a choice keeps."""
        return self.compared, self.final


def _best(choices: Sequence[SiteChoice]) -> SiteChoice:
    """Return the choice with the least noise for a constant scale, with the best of those for scales per token."""
    tokens = min((choice.tokens for choice in choices), key=lambda choice: choice.noise)
    return replace(min(choices, key=lambda choice: choice.noise), tokens=tokens)


def _best_with_transformed(choices: Sequence[SiteChoice]) -> SiteChoice:
    """Return the same for an input that shares its scales with none: as it is, and behind a transform at run time."""
    behind = [choice.transformed for choice in choices if choice.transformed is not None]
    return replace(_best(choices), transformed=_best(behind) if behind else None)


def _range_of(rows: "torch.Tensor", search: SmoothingSearch) -> float:
    """Return what a static scale covers of these rows, window by window."""
    peaks = np.array([float(part.abs().max()) for part in rows.tensor_split(search.windows) if len(part)])
    return covered_range(peaks, search.activation_range)


def _weight(layer: "nn.Module", site: InputSite) -> "torch.Tensor":
    """Return the weights of a site's readers, one above the other: [outputs, in_features] float32."""
    import torch

    weights: list[Any] = [layer.get_submodule(reader).weight for reader in site.readers]
    return torch.cat(weights).float()


def _column_magnitudes(form: Form, weight: "torch.Tensor") -> Floats:
    """Return what a formula takes of each column of a weight [outputs, in_features]."""
    typical = form == "smoothquant-typical"
    found: Floats = (weight.square().mean(0).sqrt() if typical else weight.abs().amax(0)).cpu().numpy()
    return found


def _channel_magnitudes(form: Form, spikes: ModuleSpikes) -> Floats:
    """Return what a formula takes of each channel of an input."""
    found: Floats = spikes.sample_channel_amax.mean(0) if form == "smoothquant-typical" else spikes.channel_amax
    return found


class _Rows:
    """The rows of one layer's tensors at the tokens that are looked at."""

    def __init__(self, layer: Any, stride: int) -> None:
        self._layer, self._stride = layer, stride
        self.inputs: dict[str, list[torch.Tensor]] = {}
        self._positions: dict[str, list[torch.Tensor]] = {}
        self._outputs: dict[str, list[torch.Tensor]] = {}
        self._hidden: list[torch.Tensor] = []

    def watch_input(self, name: str) -> Any:
        """Keep a linear's input rows, and which of the kept tokens they are."""
        import torch

        def hook(_: Any, inputs: "tuple[torch.Tensor, ...]") -> None:
            rows = inputs[0].reshape(-1, inputs[0].shape[-1])
            positions = routed_positions(self._layer, name)
            if positions is None:
                positions = torch.arange(len(rows), device=rows.device)
            kept = positions % self._stride == 0
            before = sum(len(part) for part in self._hidden)
            self.inputs.setdefault(name, []).append(rows[kept].float())
            self._positions.setdefault(name, []).append(positions[kept] // self._stride + before)

        return self._layer.get_submodule(name).register_forward_pre_hook(hook)

    def watch_output(self, name: str) -> Any:
        """Keep the squared norm of what a block or a norm puts out."""

        def hook(_: Any, __: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            self._outputs.setdefault(name, []).append(self._squares(states))

        return self._layer.get_submodule(name).register_forward_hook(hook)

    def hidden_hook(self, _: Any, __: Any, output: Any) -> None:
        """Keep the squared norm of the layer's output; called last, so that a batch's positions are counted here."""
        self._hidden.append(self._squares(output[0] if isinstance(output, tuple) else output))

    def _squares(self, states: "torch.Tensor") -> "torch.Tensor":
        return states.reshape(-1, states.shape[-1])[:: self._stride].float().pow(2).sum(-1)

    @property
    def tokens(self) -> int:
        """Number of tokens looked at."""
        return sum(len(part) for part in self._hidden)

    def squares(self, output: str | None, name: str) -> "torch.Tensor":
        """Return the squared norm of a watched output, or of the layer's, at each row of the input of `name`."""
        import torch

        parts = self._hidden if output is None else self._outputs[output]
        return torch.cat(parts)[torch.cat(self._positions[name])]

    def share(self, output: str) -> float:
        """Return the mean share of what is added to the residual stream in the stream, in squared norms."""
        import torch

        return float((torch.cat(self._outputs[output]) / torch.cat(self._hidden)).mean())


@dataclass(frozen=True)
class _Branch:
    """What a block adds to the residual stream.

    Attributes:
        block: The block.
        normed: Whether a norm stands between the block and the stream (sandwich norms): the norm divides the block's
            output by its size, and with it the error in it.
        share: Mean share of what is added in the stream, in squared norms.
    """

    block: str
    normed: bool
    share: float


def _added(config: DecoderConfig) -> dict[str, str]:
    """Return attention and the feed-forward block → whose output is added to the residual stream for each."""
    blocks = ("self_attn", config.family.feed_forward)
    return dict(zip(blocks, config.family.post_norms or blocks, strict=True))


class _Site:
    """One input with all that its candidates need."""

    def __init__(
        self,
        site: InputSite,
        spikes: ModuleSpikes,
        parts: tuple[ModuleSpikes, ...],
        weight: "torch.Tensor",
        seen: _Rows,
        branch: _Branch,
    ) -> None:
        import torch

        self.site, self._spikes, self._parts, self._weight = site, spikes, parts, weight
        self._rows = torch.cat(seen.inputs[site.representative])
        self._expected = self._rows @ weight.T
        self._tokens = seen.tokens
        if site.behind_linear:
            self._scale = seen.squares(branch.block if branch.normed else None, site.representative)
        else:
            self._scale = self._expected.pow(2).sum(-1)
        self._share = branch.share if branch.normed or not site.behind_linear else 1.0
        self._scale = self._scale.clamp(min=torch.finfo(torch.float32).tiny)

    def judged(self, plans: _Plans, search: SmoothingSearch) -> SiteChoice:
        """Return the noise under a plan: with the best clip of a constant scale, and with a scale per token."""
        rows, weight, scales = self._smoothed(plans.compared, search)
        covered = self._spikes.smoothed_range(scales, search.activation_range)
        clips = self._clips(plans, search)
        found = self._compared(plans, rows, weight, covered, clips, search)
        if search.hadamard is not None and is_down_projection(self.site.representative):
            mixed, weight, _ = self._smoothed(plans.compared, search, search.hadamard)
            # No statistics tell of channels that are mixed: the range is that of the rows.
            covered = _range_of(mixed, search)
            return replace(found, transformed=self._compared(plans, mixed, weight, covered, clips, search))
        if search.value_block is not None and is_per_value_head(self.site):
            return _best((found, self._mixed(plans, rows, covered, clips, search, search.value_block)))
        if search.input_block is not None and self.site.representative in block_inputs(search.config):
            # Mixed by the transform, no channel stands out, and another text needs no margin.
            behind = self._mixed(plans, rows, covered, (1.0,), search, search.input_block)
            return replace(found, transformed=_best((found, behind)))
        return found

    def _mixed(
        self,
        plans: _Plans,
        rows: "torch.Tensor",
        covered: float,
        clips: Sequence[float],
        search: SmoothingSearch,
        block: int,
    ) -> SiteChoice:
        """Return the noise behind a Hadamard transform of smoothed rows, of which a static scale covers so much."""
        mixed, weight, _ = self._smoothed(plans.compared, search, block)
        # All tokens of the statistics go beyond the few rows here; those of mixed channels as far as the others.
        covered *= _range_of(mixed, search) / max(_range_of(rows, search), SMALLEST_AMAX)
        return self._compared(plans, mixed, weight, covered, clips, search, block)

    def _clips(self, plans: _Plans, search: SmoothingSearch) -> tuple[float, ...]:
        """Return what a static scale may cover, as multiples of the calibrated range."""
        if search.activation_range == "mse":
            return CLIPS
        if search.activation_range != "sample-mean" or search.activations == "per-token" or not self._parts:
            return (1.0,)
        if is_down_projection(self.site.representative):
            # Other text goes so far beyond the range of these products that a margin costs more than saturating; mixed
            # by a transform, none of their channels stands out.
            return (1.0,)
        channels = self._weight.shape[1]
        scales = [input_scales(plan, self.site, search.config, channels) for plan in plans.parts]
        return (range_margin(self._parts, scales),)

    def _compared(
        self,
        plans: _Plans,
        rows: "torch.Tensor",
        weight: "torch.Tensor",
        covered: float,
        clips: Sequence[float],
        search: SmoothingSearch,
        block: int | None = None,
    ) -> SiteChoice:
        tokens = TokenChoice(*plans.kept, self._noise(fake_quantize_tokens(rows) @ weight), block)
        if search.activations == "per-token":
            return SiteChoice(*plans.kept, 1.0, tokens.noise, tokens, block)
        best: SiteChoice | None = None
        for clip in clips:
            noise = self._noise(fake_quantize(rows, max(clip * covered, 1e-5) / QMAX) @ weight)
            if best is None or noise < best.noise:
                best = SiteChoice(*plans.kept, clip, noise, tokens, block)
            elif noise > 2 * best.noise:
                break  # narrower scales only saturate more
        assert best is not None
        return best

    def _smoothed(
        self, plan: SmoothingPlan | None, search: SmoothingSearch, block: int | None = None
    ) -> "tuple[torch.Tensor, torch.Tensor, Floats]":
        """Return the smoothed rows, the weights' round trip [in_features, outputs], and the scales.

        Rows and weights have passed a Hadamard transform where its `block` is given.
        """
        import torch

        scales = input_scales(plan, self.site, search.config, self._weight.shape[1])
        factors = torch.from_numpy(scales).to(self._rows.device)
        rows, columns = self._rows / factors, self._weight * factors
        if block is not None:
            # As a product: its last bits may be others than those of the weight that is shipped, and it is faster.
            rows, columns = transform_channels(rows, block), transform_channels(columns, block)
        quantized, step = quantize_weight(columns.cpu().numpy(), search.weights)
        weight = (torch.from_numpy(quantized).float() * torch.from_numpy(np.asarray(step))).to(self._rows.device)
        return rows, weight, scales

    def _noise(self, product: "torch.Tensor") -> float:
        error = (product - self._expected).pow(2).sum(-1) / self._scale
        return self._share * float(error.sum()) / self._tokens
