"""The simulation of a recipe, or of the unquantized model without one, under the hooks of a comparison."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.manifest import Manifest
from spike_export.artifacts.recipe import SMOOTHED_HEAD, ModulePlan, Recipe
from spike_export.calibration.decoder.equivalent.equivalent_weights import transformed_checkpoint
from spike_export.calibration.decoder.layerwise import Decoder, Visit
from spike_export.calibration.decoder.simulate import QuantizedWeights, Simulation
from spike_export.calibration.float8 import float8_modules
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.checkpoint.modules import expert_of, linears, split_name
from spike_export.engines.onnx_runtime.taps import LOGITS, Station
from spike_export.engines.parity.forcing import Forcing, Product

if TYPE_CHECKING:
    from torch import nn

ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Precision → unit roundoff."""

ROUNDING = {"float32": 2.0**-20, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Precision of a graph → relative change of a step's inputs. A sum in float32 errs by some sixteen roundoffs."""

_HALF_STEP = 1 / 254
"""Half a step of the largest magnitude: a value between two steps of INT8 may be rounded to either."""


def tapped_linears(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the linears whose values a graph shows: all but the experts', which stand in branches."""
    return tuple(name for name in linears(checkpoint.config) if expert_of(name) is None)


@dataclass(frozen=True)
class SimulatedModel:
    """What a recipe says, computed in torch.

    Attributes:
        checkpoint: The model, rotated and smoothed as the recipe says.
        recipe: None for the model without quantization.
        modules: Linear → its plan; empty without a recipe.
        prefix_cached: Whether the cache holds the prefix.
    """

    checkpoint: Checkpoint
    recipe: Recipe | None
    modules: dict[str, ModulePlan]
    prefix_cached: bool = True

    @classmethod
    def of(cls, checkpoint: Checkpoint, recipe: Recipe | None) -> "SimulatedModel":
        """Return the model of a recipe."""
        if recipe is None:
            return cls(checkpoint, None, {})
        return cls(transformed_checkpoint(checkpoint, recipe), recipe, dict(recipe.modules))

    def exported_as(self, manifest: Manifest) -> "SimulatedModel":
        """Return the model that a bundle holds: INT8 linears may be in FP8 there, and the cache left as it was."""
        if self.recipe is None:
            return self
        plans = float8_modules(self.recipe) if "fp8" in manifest.linears else self.modules
        kept = self.recipe.kv_cache if manifest.kv_cache_dtype == "int8" else {}
        in_cache = manifest.prefix is None or manifest.prefix.in_cache
        recipe = self.recipe.model_copy(update={"kv_cache": kept})
        return replace(self, recipe=recipe, modules=dict(plans), prefix_cached=in_cache)

    def products(self, dtype: str) -> dict[str, Product]:
        """Return how a graph of a precision rounds the linears that it shows."""
        names = tapped_linears(self.checkpoint)
        return {name: _product(self.modules.get(name), dtype) for name in names}

    def nudges(self, stations: Iterable[Station], dtype: str) -> dict[Station, float]:
        """Return by how much the inputs of each step are nudged: by a rounding, or half a step in front of INT8."""
        before = self._in_front_of_int8()
        return {station: _HALF_STEP if station in before else self._rounding(station, dtype) for station in stations}

    def _rounding(self, station: Station, dtype: str) -> float:
        """Return by how much a value may be rounded; ONNX Runtime omits a round trip of a product through float16."""
        plan = self.modules.get(station.module) if station.side == "output" else None
        return max(ROUNDING[dtype], ROUNDING[plan.product_dtype] if plan else 0.0)

    def _in_front_of_int8(self) -> set[Station]:
        """Return the stations whose next step rounds to 8 bits what the step itself computes."""
        recipe = self.recipe
        if recipe is None:
            return set()
        blocks = (*recipe.attention, *recipe.kv_cache)
        found = {f"{block}.{name}_proj" for block in blocks for name in ("q", "k", "v", "qkv")}
        experts = (name for name, plan in self.modules.items() if expert_of(name) is not None and plan.number_format)
        found |= {f"model.layers.{split_name(name)[0]}.self_attn.o_proj" for name in experts}
        if recipe.scheme.head == SMOOTHED_HEAD:
            found.add(f"model.layers.{self.checkpoint.config.num_hidden_layers - 1}")
        return {Station(name, "output") for name in found}

    def run(self, decoder: Decoder, tokens: NDArray[np.int64], forcing: Forcing) -> None:
        """Run windows [windows, tokens] behind the recipe's prefix, with the hooks of `forcing`, in one batch."""
        prefix = self.recipe.prefix_ids if self.recipe else ()
        states = decoder.run(tokens, prefix, visits=self._visits(forcing), batch_tokens=tokens.size)
        head = decoder.head(*((self.recipe.scheme.head, self.recipe.head_smoothing) if self.recipe else ()))
        forcing.computed[LOGITS] = head.logits(states.get(0)).float().numpy()

    def _visits(self, forcing: Forcing) -> list[Visit]:
        @contextmanager
        def watched(index: int, layer: "nn.Module") -> Iterator[None]:
            name = f"model.layers.{index}"
            inner = [split_name(each)[1] for each in tapped_linears(self.checkpoint) if each.startswith(f"{name}.")]
            with forcing.on({**{f"{name}.{each}": layer.get_submodule(each) for each in inner}, name: layer}):
                yield

        if self.recipe is None:
            return [watched]
        weights = QuantizedWeights(self.recipe.scheme.weights, keep=False)
        simulation = Simulation(
            self.modules,
            weights,
            self.recipe.attention,
            kv_cache=self.recipe.kv_cache,
            prefix_cached=self.prefix_cached,
        )
        return [simulation.visit, watched]


def _product(plan: ModulePlan | None, dtype: str) -> Product:
    if plan is None:
        return Product(False, ROUNDOFF[dtype])
    return Product(bool(plan.number_format or plan.weights), ROUNDOFF[plan.product_dtype])


def unquantized_recipe(recipe: Recipe) -> Recipe:
    """Return a recipe that has the prefix of another one, and nothing else of it."""
    kept = ModulePlan(precision="float32", reason="unquantized")
    changes = {
        "modules": dict.fromkeys(recipe.modules, kept),
        "scheme": recipe.scheme.model_copy(update={"head": "unquantized", "attention": "unquantized"}),
        "attention": {},
        "kv_cache": {},
        "rotation": None,
        "hadamard": None,
        "input_hadamard": {},
        "smoothing": {},
        "value_rotation": {},
        "head_smoothing": None,
    }
    return recipe.model_copy(update=changes)
