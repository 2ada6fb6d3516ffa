"""Compares a graph's values with a torch model's, step by step, each step from what the graph itself read."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spike_export.engines.onnx_runtime.taps import Station, Values
from spike_export.engines.parity.forcing import Forcing

ROUNDINGS = 8.0
"""How many times the effect of nudging a step's inputs its error may be: a step rounds some ten times on its way."""

_TINY = 1e-30

_LARGEST = 1e30
"""Excess of what is not finite; JSON knows no infinity."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the model, from what the graph read to what it gave.

    Attributes:
        name: HF name of the module, such as `model.layers.0.self_attn`.
        what: What the step computes.
        excess: Largest error as a multiple of the tolerance; above 1 the step is at fault.
        window: Where the largest excess is.
        token: Position of it, in the sequence without the prefix.
        tokens: How many positions are outside the tolerance, of `positions`.
        positions: How many were compared.
    """

    name: str
    what: str
    excess: float
    window: int
    token: int
    tokens: int
    positions: int


def steps(graph: Values, exact: Forcing, nudged: Forcing, rounding: float, names: "StepNames") -> Iterator[Step]:
    """Yield the steps in the order in which the model computes them.

    Args:
        graph: What the graph computed.
        exact: What the model computed from that.
        nudged: What the model computed from nearly that.
        rounding: Relative error of a step's result as the graph rounds it.
        names: What a station's step is called.
    """
    for station, expected in exact.computed.items():
        if station not in graph:
            continue
        error = np.abs(graph[station].astype(np.float32) - expected)
        if station in exact.tolerances:
            ratios = (error / (exact.tolerances[station].reshape(error.shape) + _TINY)).max(axis=-1)
        else:
            effect = _effect(expected, nudged.computed[station]) + rounding * _of_tokens(expected)
            ratios = _of_tokens(error) / (ROUNDINGS * effect + _TINY)
        yield _step(*names.of(station), np.nan_to_num(ratios, nan=_LARGEST, posinf=_LARGEST))


def _of_tokens(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the root mean square of each token's channels [windows, tokens]."""
    found: NDArray[np.float64] = np.sqrt(np.square(values, dtype=np.float64).mean(axis=-1))
    return found


def _effect(expected: NDArray[np.float32], nudged: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return each token's effect of the nudges [windows, tokens], at least that of a typical token.

    One draw of nudges may cancel out at a token by chance; over all tokens it does not.
    """
    scale, effect = _of_tokens(expected), _of_tokens(nudged - expected)
    typical = np.sqrt(np.square(effect / (scale + _TINY)).mean())
    found: NDArray[np.float64] = np.maximum(effect, typical * scale)
    return found


def _step(name: str, what: str, ratios: NDArray[np.float64]) -> Step:
    window, token = np.unravel_index(int(ratios.argmax()), ratios.shape)
    outside = int((ratios > 1).sum())
    return Step(name, what, float(ratios.max()), int(window), int(token), outside, ratios.size)


@dataclass(frozen=True)
class StepNames:
    """Names steps by the station that they lead to.

    Attributes:
        norms: Linear inside a layer → the norm whose output it reads, or None.
    """

    norms: dict[str, str | None]

    def of(self, station: Station) -> tuple[str, str]:
        """Return the HF name of the module, and what the step computes."""
        module = station.module
        if module == "logits":
            return "lm_head", "final norm and head"
        if module == "model.embed_tokens":
            return module, "embedding"
        layer, inner = _split(module)
        if not inner:
            return module, "sum of the residual stream"
        if station.side == "output":
            return module, "product of the linear"
        norm = self.norms.get(inner)
        if norm is not None:
            return f"{layer}.{norm}", f"norm in front of {inner}"
        block = inner.rpartition(".")[0]
        if inner.endswith("o_proj"):
            return f"{layer}.{block}", "attention: positions, mask, prefix, cache, softmax"
        return f"{layer}.{block}", f"input of {inner}"


def _split(module: str) -> tuple[str, str]:
    parts = module.split(".", 3)
    return ".".join(parts[:3]), parts[3] if len(parts) > 3 else ""


def relative_error(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Return the root mean square of the difference, as a part of that of the expected values.

    Of each token, averaged, so that a token with a spike does not outweigh the others.
    """
    ratios = _of_tokens(actual.astype(np.float32) - expected) / (_of_tokens(expected) + _TINY)
    return float(np.sqrt(np.square(ratios).mean()))


def worst(found: Sequence[Step]) -> Step:
    """Return the step with the largest excess."""
    return max(found, key=lambda step: step.excess)
