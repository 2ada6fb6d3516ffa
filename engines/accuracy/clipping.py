"""Which inputs a text drives beyond their static scales, and what the clipping costs there."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.progress import Progress, silent
from spike_export.calibration.decoder.perplexity import Likelihood
from spike_export.engines.accuracy.distances import likelihood
from spike_export.engines.accuracy.intervals import Interval
from spike_export.engines.onnx_runtime.clipped_activations import CLIPPED, COUNT_CLIPPED, Site, count_clipped
from spike_export.engines.onnx_runtime.lifted_clipping import lift_clipping
from spike_export.engines.onnx_runtime.session import open_graph
from spike_export.engines.onnx_runtime.taps import all_logits_model, run_window

DUE = 0.005
"""Increase of the perplexity by clipping from which calibrating anew is due."""


@dataclass(frozen=True, slots=True)
class ClippedInput:
    """One input with a static scale.

    Attributes:
        module: HF name of the first linear that reads the input.
        clipped: Values beyond the range.
        values: All values.
    """

    module: str
    clipped: int
    values: int

    @property
    def share(self) -> float:
        """Part of the values that are clipped, 0 to 1."""
        return self.clipped / self.values


@dataclass(frozen=True)
class Clipping:
    """What a text clips.

    Attributes:
        text: Name of the text.
        windows: Windows read.
        length: Tokens of each.
        inputs: Every input with a static scale, the largest share first.
        perplexity: Of the bundle.
        unclipped_perplexity: Of the same graph where nothing is clipped and all else is rounded as before.
        cost: Increase of the perplexity by clipping, with its 95 % interval over windows.
    """

    text: str
    windows: int
    length: int
    inputs: tuple[ClippedInput, ...]
    perplexity: float
    unclipped_perplexity: float
    cost: Interval

    @property
    def share(self) -> float:
        """Part of all values in front of static scales that are clipped."""
        return sum(each.clipped for each in self.inputs) / sum(each.values for each in self.inputs)

    @property
    def due(self) -> bool:
        """Whether calibrating anew is due: the whole interval of the cost is above `DUE`."""
        return self.cost.mean - self.cost.margin > DUE

    def document(self) -> dict[str, Any]:
        """Return the result as JSON's values."""
        return {
            "format": 1,
            "text": self.text,
            "windows": self.windows,
            "length": self.length,
            "share": self.share,
            "perplexity": self.perplexity,
            "unclipped_perplexity": self.unclipped_perplexity,
            "cost": asdict(self.cost),
            "due": self.due,
            "inputs": [{**asdict(each), "share": each.share} for each in self.inputs],
        }


def measure_clipping(bundle: Path, name: str, content: NDArray[np.int64], progress: Progress = silent) -> Clipping:
    """Run a bundle over windows [windows, tokens], as it is and without clipping.

    Inputs of experts stand in branches of the graph and are not counted; their clipping is not lifted either.

    Args:
        bundle: Folder that export wrote.
        name: Of the text.
        content: Windows without BOS.
        progress: Told after each window.

    Raises:
        EngineError: No input has a static INT8 scale, or ONNX Runtime cannot run the bundle.
    """
    model = all_logits_model(bundle)
    sites = count_clipped(model.graph, bundle)
    lifted = all_logits_model(bundle)
    lift_clipping(lifted.graph, bundle)
    counting = open_graph(bundle, model.SerializeToString())
    free = open_graph(bundle, lifted.SerializeToString())
    counts = np.zeros((len(sites), 2), np.int64)
    rows = []
    for index, tokens in enumerate(content):
        logits, counted = run_window(counting, tokens, ["logits", CLIPPED], {COUNT_CLIPPED: np.ones(1, np.bool_)})
        (unclipped,) = run_window(free, tokens, ["logits"])
        counts += counted
        rows.append([likelihood(each, tokens[1:]) for each in (logits, unclipped)])
        progress("windows", index + 1, len(content))
    return _clipping(name, content.shape, sites, counts, rows)


def _clipping(
    name: str, shape: tuple[int, ...], sites: tuple[Site, ...], counts: NDArray[np.int64], rows: list[list[Likelihood]]
) -> Clipping:
    inputs = [ClippedInput(site.module, *map(int, row)) for site, row in zip(sites, counts, strict=True)]
    shipped, unclipped = (sum(column, Likelihood(0.0, 0)) for column in zip(*rows, strict=True))
    differences = np.array([(row[0].negative - row[1].negative) / row[0].tokens for row in rows])
    windows, length = shape
    return Clipping(
        name,
        windows,
        length,
        tuple(sorted(inputs, key=lambda each: -each.share)),
        shipped.perplexity,
        unclipped.perplexity,
        Interval.of(differences).as_increase,
    )
