"""How much of a quantized model's divergence each input causes: quantized alone, and left out of all.

One pass over the layers answers both questions for all inputs: a layer is read once, and each variant of the model is
carried along as hidden states of its own from the layer on in which it begins to differ. The cost is about half a pass
over the model for each input and question.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.progress import Progress, silent
from spike_export.artifacts.recipe import ModulePlan, Recipe, recipe_sha256
from spike_export.artifacts.results.attribution import Attribution, InputDivergence
from spike_export.calibration.decoder.activations import Activations
from spike_export.calibration.decoder.layerwise import Decoder, Head, batches
from spike_export.calibration.decoder.perplexity import DIVERGENCE_EVERY
from spike_export.calibration.decoder.simulate import QuantizedWeights, Simulation
from spike_export.checkpoint.modules import representative_of, siblings, split_name

if TYPE_CHECKING:
    import torch

    from spike_export.calibration.decoder.layers.attention import AttentionContext
    from spike_export.calibration.decoder.layers.layer import DecoderLayer


def attribute(
    decoder: Decoder,
    weights: QuantizedWeights,
    recipe: Recipe,
    fed: NDArray[np.int64],
    length: int,
    progress: Progress = silent,
) -> Attribution:
    """Return how much of the divergence between a recipe's model and the unquantized one each input causes.

    Only the linears of the layers are quantized here, attention's products and the head are not.

    Args:
        decoder: The model whose weights the recipe quantizes: rotated and smoothed.
        weights: Their 8-bit form.
        recipe: Which inputs are quantized, and how.
        fed: [windows, tokens] content, with BOS before it unless the prefix holds it.
        length: Trailing tokens of a window that are content.
        progress: Told after each layer.
    """
    import torch

    variants = [_NOTHING, _EVERYTHING, *_variants(recipe)]
    streams = _Streams(decoder, variants, fed)
    count = decoder.config.num_hidden_layers
    with torch.inference_mode():
        for index, layer, context in decoder.layers_in_turn(fed.shape[1], recipe.prefix_ids, count):
            for plans, group in _groups(recipe.modules, variants, index):
                with Simulation(plans, weights).visit(index, layer):
                    for variant in group:
                        streams.advance(variant, index, layer, context)
            progress("layers", index + 1, count)
        found = dict(zip(variants, streams.divergences(decoder.head(), length), strict=True))
    names = [variant.name for variant in variants if variant.name and variant.alone]
    inputs = {
        name: InputDivergence(alone=found[_Variant(name, True)], without=found[_Variant(name, False)]) for name in names
    }
    return Attribution(
        recipe_sha256=recipe_sha256(recipe), windows=len(fed), divergence=found[_EVERYTHING], inputs=inputs
    )


@dataclass(frozen=True)
class _Variant:
    """A model in which some inputs are quantized.

    Attributes:
        name: The representative of the input that is special, if any.
        alone: Whether the special input is the only one that is quantized; otherwise it is the only one that is not.
    """

    name: str
    alone: bool

    @property
    def base(self) -> "_Variant":
        """The model from which it differs at its special input."""
        return _NOTHING if self.alone else _EVERYTHING

    @property
    def layer(self) -> int:
        """The layer in which it begins to differ from its base; before every layer where nothing is special."""
        return split_name(self.name)[0] if self.name else -1


_NOTHING, _EVERYTHING = _Variant("", alone=True), _Variant("", alone=False)


def _variants(recipe: Recipe) -> Iterator[_Variant]:
    for name, plan in recipe.modules.items():
        if plan.number_format and representative_of(name) == name:
            yield _Variant(name, alone=True)
            yield _Variant(name, alone=False)


def _groups(
    modules: Mapping[str, ModulePlan], variants: list[_Variant], index: int
) -> "Iterator[tuple[Mapping[str, ModulePlan], list[_Variant]]]":
    """Yield what is quantized in a layer, and the variants in which just that is.

    Those that begin here come first: they start from the states in front of this layer of the model they differ from.
    """
    here = {name: plan for name, plan in modules.items() if split_name(name)[0] == index}
    for variant in variants:
        if variant.layer == index:
            own = set(siblings(variant.name))
            yield {name: plan for name, plan in here.items() if (name in own) == variant.alone}, [variant]
    for alone, plans in ((True, {}), (False, here)):
        yield plans, [variant for variant in variants if variant.alone == alone and variant.layer < index]


class _Streams:
    """The hidden states of all variants under way, batch by batch: in memory, or in a file where they are many."""

    def __init__(self, decoder: Decoder, variants: list[_Variant], fed: NDArray[np.int64]) -> None:
        parts, execution = batches(fed), decoder.execution
        shapes = [(*part.shape, decoder.config.hidden_size) for part in parts]
        self._parts, self._device = len(parts), execution.devices[0]
        self._states = Activations.allocate(
            shapes * len(variants), execution.dtype, execution.activation_bytes, execution.scratch
        )
        self._first = {variant: place * self._parts for place, variant in enumerate(variants)}
        first = decoder.first_states(parts)
        for part in range(self._parts):
            for variant in (_NOTHING, _EVERYTHING):
                self._states.put(self._first[variant] + part, first.get(part))

    def advance(self, variant: _Variant, index: int, layer: "DecoderLayer", context: "AttentionContext") -> None:
        """Pass a layer, whose linears are quantized already as the variant's are."""
        source = self._first[variant.base if variant.layer == index else variant]
        told = context.to(self._device)
        for part in range(self._parts):
            place = source + part
            layer.batch, layer.shape = part, self._states.shapes[place][:2]
            states = layer(self._states.get(place, self._device), told)
            self._states.put(self._first[variant] + part, states)

    def divergences(self, head: Head, length: int) -> list[float]:
        """Return KL(nothing quantized || variant) of each variant, mean over content tokens [length], in nats."""
        import torch

        sums, tokens = [0.0] * len(self._first), 0
        for part in range(self._parts):
            expected = self._log_probabilities(head, _NOTHING, part, length)
            tokens += len(expected)
            for place, variant in enumerate(self._first):
                found = self._log_probabilities(head, variant, part, length)
                sums[place] += float(torch.nn.functional.kl_div(found, expected, reduction="sum", log_target=True))
        return [each / tokens for each in sums]

    def _log_probabilities(self, head: Head, variant: _Variant, part: int, length: int) -> "torch.Tensor":
        """Return [tokens, vocabulary] at every few content tokens of a batch."""
        import torch

        states = self._states.get(self._first[variant] + part)[:, -length::DIVERGENCE_EVERY]
        return torch.log_softmax(head.logits(states.flatten(0, 1)).float(), -1)
