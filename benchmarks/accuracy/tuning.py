"""What tuning a recipe's constants, which calibration does not do, would gain on texts that it never saw.

Constants: the static activation scales, with the gradient of LSQ (arXiv 1902.08153); and the prefix's keys and values
(step 2 of CushionCache, arXiv 2406.12016). They are trained to bring the quantized model close to the unquantized one
behind the prefix as it was, never to predict the text: all together by the divergence of the predictions, or layer by
layer by the error of each layer's outputs (as in PrefixQuant, arXiv 2410.05265). Every second window of the texts under
--made-of trains, the others judge, and so do texts of other kinds.
Run: python -m benchmarks.accuracy.tuning --recipe RUN/recipe.json [--made-of TEXT ...] [--static] TEXT [TEXT ...]
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from benchmarks.accuracy.corrections import forward_around
from benchmarks.accuracy.unseen_text import (
    AS_CHOSEN,
    PER_TOKEN,
    STATIC,
    WEIGHTS,
    Judge,
    Measured,
    line,
    text_windows,
    variants,
)
from benchmarks.fetch_models import smollm2_path
from spike_export.artifacts.recipe import ModulePlan, Recipe, load_recipe
from spike_export.calibration.corpus.files import HELP_TOPICS
from spike_export.calibration.decoder.layerwise import Decoder, Execution, Visit
from spike_export.calibration.decoder.perplexity import with_bos
from spike_export.calibration.decoder.simulate import QuantizedWeights, Simulation, fake_quantize_tokens
from spike_export.checkpoint.modules import representative_of, split_name
from spike_export.checkpoint.opening import open_checkpoint

if TYPE_CHECKING:
    import torch
    from torch import nn

    from spike_export.calibration.decoder.layers.attention import AttentionContext, KeyValue

AS_GIVEN, LAYERS, SCALES, PREFIX, NEUTRAL = (
    "as given",
    "scales, layer by layer",
    "scales",
    "scales and prefix",
    "unquantized, tuned prefix",
)

SCALE_RATE = 0.02
"""Step of Adam in the logarithm of a scale: about 2 % a step."""

PREFIX_RATE = 0.002
"""Step of Adam in keys and values, relative to their root mean square in a layer."""

BETAS = (0.9, 0.99)
"""Adam's averages: few steps, so that the second one forgets sooner than by default."""

_EVERY = 4
"""Every how many tokens the divergence is taken, from a place that is drawn."""


def rounded_with(values: "torch.Tensor", scale: "torch.Tensor") -> "torch.Tensor":
    """Return `values` after a round trip through INT8 with a scale [] that has LSQ's gradient.

    Rounding passes gradients straight through; what saturates has none, and gives the scale its bound.
    Source: arXiv 1902.08153, equations 1 to 3.
    """
    steps = (values / scale).clamp(-128, 127)
    return (steps + (steps.round() - steps).detach()) * scale


def rounded_per_token(values: "torch.Tensor") -> "torch.Tensor":
    """Return `values` after a round trip through INT8 with a scale per token; gradients pass straight through."""
    return values + (fake_quantize_tokens(values.detach()) - values).detach()


@dataclass(frozen=True)
class Constants:
    """What is trained.

    Attributes:
        scales: Representative of an input → logarithm of its static scale, [].
        prefix: Keys and values of each layer; empty without a prefix.
    """

    scales: "Mapping[str, torch.Tensor]"
    prefix: "Sequence[KeyValue]"

    @classmethod
    def of(cls, decoder: Decoder, plans: Mapping[str, ModulePlan], prefix: Sequence[int]) -> "Constants":
        """Return the constants of a recipe, in leaves that can be trained."""
        import torch

        from spike_export.calibration.decoder.layers.attention import KeyValue

        # A decoder of its own: what it reads without gradients cannot be trained through.
        stored = Decoder(decoder.checkpoint, Execution(resident=False)).prefix_key_values(prefix) if prefix else []
        scales = {
            representative_of(name): torch.tensor(math.log(plan.static_scale))
            for name, plan in plans.items()
            if plan.static_scale is not None
        }
        pairs = [KeyValue(torch.from_numpy(key)[None], torch.from_numpy(value)[None]) for key, value in stored]
        return cls(scales, pairs)

    def in_plans(self, plans: Mapping[str, ModulePlan]) -> dict[str, ModulePlan]:
        """Return the plans with these scales."""
        return {
            name: plan.model_copy(
                update={"activation_scale": float(self.scales[representative_of(name)].detach().exp())}
            )
            if plan.static_scale is not None
            else plan
            for name, plan in plans.items()
        }

    def wanted(self, prefix: bool) -> Self:
        """Ask for gradients of the scales, and of keys and values if `prefix`; return the constants."""
        for scale in self.scales.values():
            scale.requires_grad_()
        for pair in self.prefix:
            pair.key.requires_grad_(prefix)
            pair.value.requires_grad_(prefix)
        return self

    @contextmanager
    def attached(self, index: int, layer: "nn.Module") -> Iterator[None]:
        """Within the block, these keys and values stand before every sequence instead of the prefix's own."""

        def replaced(_: Any, given: "tuple[torch.Tensor, AttentionContext]") -> Any:
            return given[0], replace(given[1], past=self.prefix[index])

        handle = layer.get_submodule("self_attn").register_forward_pre_hook(replaced) if self.prefix else None
        try:
            yield
        finally:
            if handle is not None:
                handle.remove()


@dataclass(frozen=True)
class Trainee:
    """A quantized model whose constants gradients reach; it computes what the simulation of its plans computes.

    Attributes:
        decoder: The weights that are quantized.
        plans: Linear → its plan.
        weights: Simulates the INT8 weights alone.
        constants: What is trained.
    """

    decoder: Decoder
    plans: Mapping[str, ModulePlan]
    weights: Simulation
    constants: Constants

    @contextmanager
    def visit(self, index: int, layer: "nn.Module") -> Iterator[None]:
        """Within the block, the layer computes quantized."""
        with self.weights.visit(index, layer), self.constants.attached(index, layer), ExitStack() as stack:
            for name, plan in self.plans.items():
                number, inner = split_name(name)
                if number == index and plan.number_format:
                    stack.enter_context(
                        forward_around(layer.get_submodule(inner), self._behind_a_quantizer(name, plan))
                    )
            yield

    def _behind_a_quantizer(self, name: str, plan: ModulePlan) -> Callable[[Any], Any]:
        if plan.static_scale is None:
            return lambda product: lambda inputs: product(rounded_per_token(inputs))
        scale = self.constants.scales[representative_of(name)]
        return lambda product: lambda inputs: product(rounded_with(inputs, scale.exp()))

    def outputs(self, window: NDArray[np.int64], prefix: Sequence[int], quantized: bool) -> "torch.Tensor":
        """Return the last layer's output [1, tokens, hidden] for a window [tokens]."""
        states = self.decoder.embedded(window[None])
        count = self.decoder.config.num_hidden_layers
        for index, layer, context in self.decoder.layers_in_turn(len(window), prefix, count):
            with self.visit(index, layer) if quantized else ExitStack():
                states = layer(states, context)
        return states


def tune(trainee: Trainee, windows: NDArray[np.int64], prefix: Sequence[int], steps: int, seed: int = 0) -> None:
    """Train all constants that want a gradient by the divergence from the unquantized model, a window at a time.

    Args:
        trainee: Its constants are changed in place.
        windows: [windows, tokens] what the model is fed.
        prefix: Token ids behind which the unquantized model stands.
        steps: Of Adam.
        seed: Of the order.
    """
    import torch

    head, draw = trainee.decoder.head(), np.random.default_rng(seed)
    with torch.no_grad():
        expected = [trainee.outputs(window, prefix, quantized=False) for window in windows]
    order = [place for _ in range(-(-steps // len(windows))) for place in draw.permutation(len(windows))]

    def divergence(step: int) -> "torch.Tensor":
        place, first = order[step], int(draw.integers(_EVERY))
        states = (trainee.outputs(windows[place], prefix, quantized=True), expected[place])
        actual, wanted = (head.logits(each[0, first::_EVERY]).log_softmax(-1) for each in states)
        return torch.nn.functional.kl_div(actual, wanted, reduction="batchmean", log_target=True)

    _descend(_groups(trainee.constants), steps, divergence)


def tune_layer_by_layer(trainee: Trainee, windows: NDArray[np.int64], prefix: Sequence[int], steps: int) -> None:
    """Train each layer's scales by the error of its outputs, relative to a token's residual stream.

    A layer reads what the tuned layers before it make, and is held against the unquantized model's outputs. Arguments
    as in `tune`; the steps are those of each layer.
    """
    import torch

    with torch.no_grad():
        expected = [trainee.decoder.embedded(window[None]) for window in windows]
    found, count = list(expected), trainee.decoder.config.num_hidden_layers
    for index, layer, context in trainee.decoder.layers_in_turn(windows.shape[1], prefix, count):
        with torch.no_grad():
            expected = [layer(states, context) for states in expected]
        pairs, forward = list(zip(found, expected, strict=True)), partial(layer, context=context)
        with trainee.visit(index, layer):
            _descend(_groups(trainee.constants, index), steps, partial(_layer_error, forward, pairs))
            with torch.no_grad():
                found = [forward(states) for states in found]


def _layer_error(forward: "Callable[[torch.Tensor], torch.Tensor]", pairs: Sequence[Any], step: int) -> "torch.Tensor":
    """Return the error of a layer's outputs on one window's (inputs, wanted outputs), the windows taking turns."""
    inputs, wanted = pairs[step % len(pairs)]
    error: torch.Tensor = (forward(inputs) - wanted).pow(2).sum(-1) / wanted.pow(2).sum(-1)
    return error.mean()


def _descend(groups: list[dict[str, Any]], steps: int, loss: "Callable[[int], torch.Tensor]") -> None:
    """Take steps of Adam on a loss that is told the step; the rates fall to 0 as half a cosine."""
    import torch

    if not groups:  # a layer whose inputs have no constant
        return
    optimizer = torch.optim.Adam(groups, betas=BETAS)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(loss(step))
        optimizer.step()
        schedule.step()


def _groups(constants: Constants, layer: int | None = None) -> list[dict[str, Any]]:
    """Return the constants that want a gradient, of one layer or of all, each with the step of its optimizer."""
    scales = [scale for name, scale in constants.scales.items() if layer in (None, split_name(name)[0])]
    pairs = constants.prefix if layer is None else constants.prefix[layer : layer + 1]
    states = [each for pair in pairs for each in (pair.key, pair.value) if each.requires_grad]
    return [
        *({"params": [each], "lr": SCALE_RATE} for each in scales if each.requires_grad),
        *({"params": [each], "lr": PREFIX_RATE * float(each.detach().square().mean().sqrt())} for each in states),
    ]


def evaluate(
    judge: Judge, recipe: Recipe, plans: Mapping[str, ModulePlan], made_of: NDArray[np.int64], steps: int
) -> Iterator[tuple[str, str, Measured]]:
    """Yield text, variant and what was found: the plans as they are, and tuned in each way.

    A scale per token everywhere shows what is left for constants to gain. The unquantized model behind the tuned keys
    and values tells whether they stayed neutral.

    Args:
        judge: Has the texts.
        recipe: Its prefix, and how weights are quantized.
        plans: Linear → its plan.
        made_of: [windows, tokens] of what the constants are trained on.
        steps: Of the training of all together, and of each layer where layers are trained one by one.
    """
    decoder, prefix = judge.decoder(recipe), recipe.prefix_ids
    store = QuantizedWeights(recipe.scheme.weights)
    weights = Simulation(variants(recipe)[WEIGHTS], store)
    bos = decoder.checkpoint.bos_token_id
    fed = made_of if bos in prefix else with_bos(made_of, bos)

    def rows(name: str, model: Decoder, *visits: Visit) -> Iterator[tuple[str, str, Measured]]:
        for text in judge.texts:
            yield text, name, judge.measured(text, recipe, model, visits)

    yield from rows(PER_TOKEN, decoder, Simulation(variants(recipe)[PER_TOKEN], store).visit)
    yield from rows(AS_GIVEN, decoder, Simulation(plans, store).visit)
    for name, with_prefix, train in (
        (LAYERS, False, tune_layer_by_layer),
        (SCALES, False, tune),
        *(((PREFIX, True, tune),) if prefix else ()),
    ):
        # Trained on weights of its own reading: tensors that an inference pass read take no part in gradients.
        learner = judge.decoder(recipe)
        trainee = Trainee(learner, plans, weights, Constants.of(learner, plans, prefix).wanted(with_prefix))
        started = time.monotonic()
        train(trainee, fed, prefix, steps)
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
        constants = trainee.constants.wanted(False)
        yield from rows(name, decoder, Simulation(constants.in_plans(plans), store).visit, constants.attached)
    if prefix:
        yield from rows(NEUTRAL, decoder, constants.attached)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", metavar="TEXT")
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--model", help="HF directory or .gguf file; SmolLM2-135M-Instruct without")
    parser.add_argument("--static", action="store_true", help="give every input a constant scale first")
    parser.add_argument("--made-of", action="append", default=[], help="text to train on")
    parser.add_argument("--made-windows", type=int, default=8, help="windows of each of those texts")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--text-field", help="key of the texts in the records of a .jsonl or .parquet file")
    parser.add_argument("--windows", type=int, default=3, help="windows of each text that judges")
    arguments = parser.parse_args(given)
    checkpoint, recipe = open_checkpoint(arguments.model or str(smollm2_path())), load_recipe(arguments.recipe)
    count = arguments.made_windows
    made = {each: text_windows(checkpoint, each, None, 2 * count) for each in arguments.made_of or [HELP_TOPICS]}
    texts = {each: text_windows(checkpoint, each, arguments.text_field, arguments.windows) for each in arguments.texts}
    texts |= {source: windows[1::2][: arguments.windows] for source, windows in made.items()}
    plans = variants(recipe)[STATIC if arguments.static else AS_CHOSEN]
    trained_on = np.concatenate([windows[::2] for windows in made.values()])
    found: dict[tuple[str, str], Measured] = {}
    for text, variant, measured in evaluate(Judge(checkpoint, texts), recipe, plans, trained_on, arguments.steps):
        found[text, variant] = measured
        print(line(text, arguments.recipe.parent.name, variant, measured), flush=True)
    for (text, variant), measured in found.items():
        if variant in (LAYERS, SCALES, PREFIX):
            print(line(text, "less as given", variant, measured.over(found[text, AS_GIVEN])))


if __name__ == "__main__":
    main()
