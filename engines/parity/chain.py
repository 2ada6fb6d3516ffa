"""The chain from transformers' model to the bundle in ONNX Runtime, link by link, step by step."""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.manifest import load_manifest
from spike_export.artifacts.progress import Progress, silent
from spike_export.artifacts.recipe import Recipe
from spike_export.calibration.decoder.equivalent.rotation import rotation_matrix
from spike_export.calibration.decoder.heap import collect_and_return_memory
from spike_export.calibration.decoder.layerwise import Decoder
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.checkpoint.modules import input_sites
from spike_export.engines.onnx_runtime.taps import LOGITS, Station, Values, open_tapped
from spike_export.engines.parity.comparison import Step, StepNames, relative_error, steps, worst
from spike_export.engines.parity.forcing import Forcing
from spike_export.engines.parity.simulated_model import ROUNDING, SimulatedModel, tapped_linears, unquantized_recipe
from spike_export.engines.parity.transformers_model import run_transformers, transformers_model
from spike_export.export.bundle import ExportOptions, export_bundle

UNQUANTIZED_LINK = "transformers to the unquantized graph"
DECODER_LINK = "spike-export's decoder to the unquantized graph"
BUNDLE_LINK = "simulation of the recipe to the bundle in ONNX Runtime"

Run = Callable[[Forcing], None]

Growth = tuple[tuple[str, float], ...]
"""(Place, error) of each layer's output and of the logits, where both compute on their own: root mean square of the
difference, as a part of that of the values."""


@dataclass(frozen=True)
class Link:
    """Two ways to compute one thing, compared.

    Attributes:
        name: Which two.
        outside: The steps outside their tolerance, in the model's order: the first is where the fault arises.
        worst: The step nearest its tolerance, or farthest outside.
        compared: How many steps were.
        growth: Of the error from layer to layer.
    """

    name: str
    outside: tuple[Step, ...]
    worst: Step
    compared: int
    growth: Growth = ()


@dataclass(frozen=True)
class Parity:
    """A bundle against the model and the recipe that it was made of.

    Attributes:
        links: With a tolerance for each step.
        quantization: What quantization changes, by intent: the growth from the unquantized graph to the simulation.
        windows: Windows compared.
        tokens: Tokens of each.
    """

    links: tuple[Link, ...]
    quantization: Growth
    windows: int
    tokens: int

    @property
    def passed(self) -> bool:
        """Whether every step of every link is inside its tolerance."""
        return not any(link.outside for link in self.links)

    def document(self) -> dict[str, Any]:
        """Return the result as JSON's values."""
        links = [{**asdict(link), "growth": _rows(link.growth)} for link in self.links]
        return {
            "format": 1,
            "passed": self.passed,
            "windows": self.windows,
            "tokens": self.tokens,
            "links": links,
            "quantization": _rows(self.quantization),
        }


def _rows(growth: Growth) -> list[dict[str, Any]]:
    return [{"place": place, "error": error} for place, error in growth]


@dataclass(frozen=True)
class Chain:
    """What is compared.

    Attributes:
        checkpoint: The model as it is stored.
        recipe: What the bundle was made by; None for a bundle without quantization.
        tokens: Windows [windows, tokens], BOS included unless the prefix holds it.
    """

    checkpoint: Checkpoint
    recipe: Recipe | None
    tokens: NDArray[np.int64]

    @property
    def prefix(self) -> tuple[int, ...]:
        """Token ids of the prefix."""
        return self.recipe.prefix_ids if self.recipe else ()

    def values(self, bundle: Path) -> dict[Station, NDArray[Any]]:
        """Return what a bundle's graph computes.

        Raises:
            EngineError: ONNX Runtime cannot run the bundle, or its graph was changed.
        """
        layers = self.checkpoint.config.num_hidden_layers
        return open_tapped(bundle, tapped_linears(self.checkpoint), layers).run(self.tokens)

    def link(self, name: str, graph: Values, model: SimulatedModel, dtype: str, run: Run, skipped: int = 0) -> Link:
        """Compare a graph of a precision with a model that goes on from the graph's values at every step.

        Args:
            name: Of the link.
            graph: What the graph computed.
            model: Says how the graph rounds.
            dtype: The graph's precision.
            run: Computes the model under hooks.
            skipped: Tokens of a prefix that `run` has in front of the windows.
        """
        exact = Forcing(graph, model.products(dtype), skipped=skipped)
        nudged = Forcing(graph, nudges=model.nudges(graph, dtype), skipped=skipped)
        run(exact)
        run(nudged)
        found = tuple(steps(graph, exact, nudged, ROUNDING[dtype], self._names))
        return Link(name, tuple(step for step in found if step.excess > 1), worst(found), len(found))

    @cached_property
    def _names(self) -> StepNames:
        sites = input_sites(self.checkpoint.config)
        return StepNames(
            {reader: site.producer if site.behind_norm else None for site in sites for reader in site.readers}
        )

    def growth(self, actual: Values, expected: Values) -> Growth:
        """Return the error of each layer's output, and of the logits."""
        layers = range(self.checkpoint.config.num_hidden_layers)
        stations = (*(Station(f"model.layers.{index}", "output") for index in layers), LOGITS)
        return tuple(
            (station.module, relative_error(actual[station], expected[station].astype(np.float32)))
            for station in stations
        )


def parity_chain(chain: Chain, bundle: Path, progress: Progress = silent) -> Parity:
    """Compare a bundle with the model and the recipe it was made of, from one computation to the next.

    Each step of the model (a norm, a linear's product, attention, a sum) gets what the graph's own step read, and is
    compared with what the graph's step gave: an error shows where it arises, and nowhere behind. Tolerances follow
    from the precision: for products from the rounding of sums, for other steps from what nudged inputs change.

    Args:
        chain: Model, recipe and tokens.
        bundle: Folder that export wrote, of float16 or float32.
        progress: Told after each of the two parts.

    Raises:
        EngineError: ONNX Runtime cannot run the bundle, or its graph was changed.
        ArtifactError: The temporary folder has too little room for the unquantized model in float32.
    """
    first, graph = unquantized_links(chain)
    progress("links", 1, 2)
    last, simulated = bundle_link(chain, bundle)
    progress("links", 2, 2)
    quantization = chain.growth(simulated, _rotated(graph, chain))
    windows, tokens = chain.tokens.shape
    return Parity((*first, last), quantization, windows, tokens)


def unquantized_links(chain: Chain) -> tuple[tuple[Link, ...], Values]:
    """Compare the graph without quantization, in float32, with transformers and with spike-export's own decoder.

    Returns:
        The links, and what the graph computed.
    """
    recipe = None if chain.recipe is None else unquantized_recipe(chain.recipe)
    with tempfile.TemporaryDirectory(prefix="spike-export-") as folder:
        bundle = Path(folder) / "unquantized"
        export_bundle(chain.checkpoint, recipe, ExportOptions("float32"), bundle)
        graph = chain.values(bundle)
    model = SimulatedModel.of(chain.checkpoint, recipe)
    decoder = Decoder(chain.checkpoint)
    own = chain.link(DECODER_LINK, graph, model, "float32", partial(model.run, decoder, chain.tokens))
    return (_of_transformers(chain, graph, model), own), graph


def _of_transformers(chain: Chain, graph: Values, model: SimulatedModel) -> Link:
    """Return the first link; transformers' model is let go."""
    skipped = len(chain.prefix)
    run = partial(run_transformers, transformers_model(chain.checkpoint), chain.checkpoint, chain.tokens, chain.prefix)
    free = Forcing(skipped=skipped)
    run(free)
    found = chain.link(UNQUANTIZED_LINK, graph, model, "float32", run, skipped)
    del run
    collect_and_return_memory()
    return replace(found, growth=chain.growth(graph, free.computed))


def bundle_link(chain: Chain, bundle: Path) -> tuple[Link, Values]:
    """Compare a bundle in ONNX Runtime with the simulation of its recipe.

    Returns:
        The link, and what the simulation computes on its own.
    """
    manifest = load_manifest(bundle)
    graph = chain.values(bundle)
    model = SimulatedModel.of(chain.checkpoint, chain.recipe).exported_as(manifest)
    run = partial(model.run, Decoder(model.checkpoint), chain.tokens)
    free = Forcing()
    run(free)
    found = chain.link(BUNDLE_LINK, graph, model, manifest.dtype, run)
    return replace(found, growth=chain.growth(graph, free.computed)), free.computed


def _rotated(values: Values, chain: Chain) -> Values:
    """Return the layers' outputs in the basis of the recipe's rotation."""
    recipe = chain.recipe
    if recipe is None or recipe.rotation is None:
        return values
    matrix = rotation_matrix(recipe.rotation, chain.checkpoint.config.hidden_size).astype(np.float32)
    layers = (station for station in values if station.module.count(".") == 2)
    return {**values, **{station: values[station] @ matrix for station in layers}}
