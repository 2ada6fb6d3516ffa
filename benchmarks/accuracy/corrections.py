"""What two corrections that calibration does not make would gain on texts that it never saw.

Rounding: weights are rounded column by column, and the columns to come make each error good (GPTQ, arXiv 2210.17323).
Bias: the mean of each linear's output error is subtracted (bias correction, arXiv 1906.04721). Both are made from
windows of the texts under --made-of and judged on other texts, as `benchmarks.accuracy.unseen_text` does.
Run: python -m benchmarks.accuracy.corrections --recipe RUN/recipe.json [--made-of TEXT ...] [--windows N] TEXT ...
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.accuracy.unseen_text import AS_CHOSEN, WEIGHTS, Judge, Measured, line, text_windows, variants
from benchmarks.fetch_models import smollm2_path
from spike_export.artifacts.recipe import QMAX, NumberFormat, Recipe, load_recipe
from spike_export.calibration.corpus.files import HELP_TOPICS
from spike_export.calibration.decoder.layerwise import Decoder, Visit
from spike_export.calibration.decoder.perplexity import with_bos
from spike_export.calibration.decoder.simulate import QuantizedWeights, Simulation
from spike_export.checkpoint.modules import input_sites, split_name
from spike_export.checkpoint.opening import open_checkpoint

if TYPE_CHECKING:
    import torch
    from torch import nn

DAMPING = 0.01
"""What is added to the diagonal of the inputs' products, as a share of its mean."""

_BLOCK = 128
"""Columns after which those to come are corrected."""

Forward = Callable[["torch.Tensor"], "torch.Tensor"]


@dataclass(frozen=True)
class GivenWeights(QuantizedWeights):
    """Weights that were rounded elsewhere: linear → [out_features, in_features] after the round trip, float32."""

    given: "Mapping[str, torch.Tensor]" = field(default_factory=dict)

    def dequantized(
        self, module: str, weight: Any, factors: Any = None, number_format: NumberFormat = "int8"
    ) -> "torch.Tensor":
        """Return the given weight."""
        return self.given[module]


def rounded_weight(weight: "torch.Tensor", products: "torch.Tensor", damping: float = DAMPING) -> "torch.Tensor":
    """Return a weight [out_features, in_features] after GPTQ's round trip through INT8, with a step for each row.

    Args:
        weight: float32.
        products: [in_features, in_features] sum over tokens of the inputs' outer products.
        damping: As `DAMPING`.
    """
    import torch

    step = weight.abs().amax(1) / QMAX
    order = torch.argsort(products.diagonal(), descending=True, stable=True)
    damped = products[order][:, order].double()
    damped.diagonal().add_(damping * damped.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    left, result = weight[:, order].T.contiguous(), torch.empty_like(weight)
    for start in range(0, len(left), _BLOCK):
        stop = min(start + _BLOCK, len(left))
        errors = torch.empty(stop - start, len(weight))
        for place in range(start, stop):
            value = (left[place] / step).round().clamp_(-QMAX, QMAX) * step
            errors[place - start] = (left[place] - value) / factor[place, place]
            left[place:stop].addr_(factor[place, place:stop], errors[place - start], alpha=-1)
            result[:, order[place]] = value
        left[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return result


@dataclass
class InputProducts:
    """Visits the unquantized model and sums up the outer products of every linear input's tokens.

    A token behind a linear counts relative to the residual stream, so that a spike counts as any other token.

    Attributes:
        decoder: The model that is visited.
        sums: Representative module → [channels, channels].
    """

    decoder: Decoder
    sums: "dict[str, torch.Tensor]" = field(default_factory=dict)

    @contextmanager
    def visit(self, index: int, layer: "nn.Module") -> Iterator[None]:
        """Within the block, the layer's tokens are added."""
        sites = {site.representative: site.behind_linear for site in input_sites(self.decoder.config)}
        seen: dict[str, Any] = {}

        def keep(name: str) -> Any:
            return layer.get_submodule(name).register_forward_pre_hook(lambda _, given: seen.update({name: given[0]}))

        def add(_: Any, __: Any, output: "torch.Tensor") -> None:
            stream = output.pow(2).mean(-1, keepdim=True).sqrt()
            for name, states in seen.items():
                rows = (states / stream if sites[name] else states).flatten(0, -2)
                total = self.sums.setdefault(f"model.layers.{index}.{name}", rows.new_zeros(rows.shape[1:] * 2))
                total.addmm_(rows.T, rows)

        handles = [*map(keep, sites), layer.register_forward_hook(add)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def rounded(self, recipe: Recipe) -> GivenWeights:
        """Return the recipe's INT8 weights, rounded with the sums."""
        import torch

        given = {}
        for index in range(self.decoder.config.num_hidden_layers):
            with self.decoder.layer(index) as layer, torch.inference_mode():
                for site in input_sites(self.decoder.config):
                    products = self.sums[f"model.layers.{index}.{site.representative}"]
                    for reader in site.readers:
                        weight: Any = layer.get_submodule(reader).weight
                        given[f"model.layers.{index}.{reader}"] = rounded_weight(weight.float(), products)
        return GivenWeights(recipe.scheme.weights, given=given)


@contextmanager
def forward_around(linear: Any, around: Callable[[Forward], Forward]) -> Iterator[None]:
    """Within the block, replace a linear's forward, which may be replaced already, by one that is around it."""
    inner = linear.forward
    linear.forward = around(inner)
    try:
        yield
    finally:
        linear.forward = inner


@dataclass
class MeanErrors:
    """Visits the model that a simulation quantizes, and finds or subtracts the mean error of each linear's output.

    Attributes:
        simulation: What is quantized.
        sums: Linear → sum of its errors [out_features], and the number of tokens.
    """

    simulation: Simulation
    sums: "dict[str, Any]" = field(default_factory=lambda: defaultdict(float))
    tokens: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    @contextmanager
    def found(self, index: int, layer: "nn.Module") -> Iterator[None]:
        """Within the block, each linear's errors are added up; the layer computes as the unquantized one."""

        def around(name: str, linear: Any) -> Callable[[Forward], Forward]:
            def replaced(quantized: Forward) -> Forward:
                def forward(inputs: "torch.Tensor") -> "torch.Tensor":
                    expected: torch.Tensor = type(linear).forward(linear, inputs)
                    error = (quantized(inputs) - expected).flatten(0, -2)
                    self.sums[name] += error.sum(0)
                    self.tokens[name] += len(error)
                    return expected

                return forward

            return replaced

        with self._replaced(index, layer, around):
            yield

    @contextmanager
    def subtracted(self, index: int, layer: "nn.Module") -> Iterator[None]:
        """Within the block, the layer computes quantized, without the mean errors."""

        def around(name: str, _: Any) -> Callable[[Forward], Forward]:
            mean = self.sums[name] / self.tokens[name]
            return lambda quantized: lambda inputs: quantized(inputs) - mean

        with self._replaced(index, layer, around):
            yield

    @contextmanager
    def _replaced(
        self, index: int, layer: "nn.Module", around: Callable[[str, Any], Callable[[Forward], Forward]]
    ) -> Iterator[None]:
        with self.simulation.visit(index, layer), ExitStack() as stack:
            for name, plan in self.simulation.modules.items():
                number, inner = split_name(name)
                if number == index and (plan.number_format or plan.weights):
                    linear = layer.get_submodule(inner)
                    stack.enter_context(forward_around(linear, around(name, linear)))
            yield


def evaluate(judge: Judge, recipe: Recipe, made_of: NDArray[np.int64]) -> Iterator[tuple[str, str, Measured]]:
    """Yield text, variant and what was found: INT8 weights alone and the recipe as it is, each with its corrections.

    Args:
        judge: Has the texts.
        recipe: Of a model whose linears are all quantized.
        made_of: [windows, tokens] of what the corrections are made.
    """
    decoder = judge.decoder(recipe)
    bos = decoder.checkpoint.bos_token_id
    fed = made_of if bos in recipe.prefix_ids else with_bos(made_of, bos)
    weights = variants(recipe)[WEIGHTS]
    nearest, products = QuantizedWeights(recipe.scheme.weights), InputProducts(decoder)
    errors = MeanErrors(Simulation(recipe.modules, nearest))
    decoder.run(fed, recipe.prefix_ids, visits=(products.visit, errors.found))
    rounded = products.rounded(recipe)
    visits: dict[str, Visit] = {
        WEIGHTS: Simulation(weights, nearest).visit,
        f"{WEIGHTS}, GPTQ": Simulation(weights, rounded).visit,
        AS_CHOSEN: Simulation(recipe.modules, nearest).visit,
        f"{AS_CHOSEN}, GPTQ": Simulation(recipe.modules, rounded).visit,
        f"{AS_CHOSEN}, bias": errors.subtracted,
    }
    for text in judge.texts:
        for variant, visit in visits.items():
            yield text, variant, judge.measured(text, recipe, decoder, (visit,))


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", metavar="TEXT")
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--model", help="HF directory or .gguf file; SmolLM2-135M-Instruct without")
    parser.add_argument("--made-of", action="append", default=[], help="text to make the corrections of")
    parser.add_argument("--made-windows", type=int, default=16, help="windows of each of those texts")
    parser.add_argument("--text-field", help="key of the texts in the records of a .jsonl or .parquet file")
    parser.add_argument("--windows", type=int, default=8, help="windows of each text that judges")
    arguments = parser.parse_args(given)
    checkpoint = open_checkpoint(arguments.model or str(smollm2_path()))
    made_of = arguments.made_of or [HELP_TOPICS]
    made = np.concatenate([text_windows(checkpoint, each, None, arguments.made_windows) for each in made_of])
    texts = {each: text_windows(checkpoint, each, arguments.text_field, arguments.windows) for each in arguments.texts}
    for text, variant, measured in evaluate(Judge(checkpoint, texts), load_recipe(arguments.recipe), made):
        print(line(text, arguments.recipe.parent.name, variant, measured), flush=True)


if __name__ == "__main__":
    main()
