"""QFeP: find a short prefix that takes the activation spikes once, so that no later token spikes.

Source: arXiv 2405.14428, "quantization-free prefix". The search proposes `[b, x, c]`: BOS, a context token and the
token that spikes; `accept` (ours: the paper takes what it finds) turns down a prefix that does not lower the worst
ratio, and lets a plain `[b]` compete.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spike_export.calibration.measure import measure_spikes
from spike_export.calibration.modules import split_name
from spike_export.calibration.progress import Progress, silent
from spike_export.calibration.reference_model import ReferenceModel
from spike_export.calibration.spikes import SpikeStatistics

TOKENS_PER_SAMPLE = 3
CANDIDATES = 3
CONTEXTS = 200


@dataclass(frozen=True, slots=True)
class ProposedPrefix:
    """The best context for one spiking token.

    Attributes:
        token_ids: `[b, x, c]`.
        first: Token scale of c the first time it stands in `[b, x, c, x, c]`, at the worst module's input.
        second: The same, the second time.
    """

    token_ids: tuple[int, int, int]
    first: float
    second: float

    @property
    def rate(self) -> float:
        """How much of the spike the first occurrence takes: first / second."""
        return self.first / self.second if self.second else float("inf")


def spiking_tokens(statistics: SpikeStatistics, module: str, bos: int, count: int = CANDIDATES) -> tuple[int, ...]:
    """Return the ids with the largest token scales at `module`, largest first, BOS left out.

    As in the reference code: of every sample the three tokens with the largest scales; per id the largest scale
    seen; of these the `count` largest.
    """
    amax = statistics.modules[module].token_amax
    largest: dict[int, float] = {}
    for scales, tokens in zip(amax, statistics.token_ids, strict=True):
        for position in np.argsort(-scales, kind="stable")[:TOKENS_PER_SAMPLE]:
            token = int(tokens[position])
            if token != bos:
                largest[token] = max(largest.get(token, 0.0), float(scales[position]))
    return tuple(sorted(largest, key=lambda token: (-largest[token], token))[:count])


def frequent_tokens(windows: NDArray[np.int64], count: int = CONTEXTS) -> NDArray[np.int64]:
    """Return the `count` most frequent ids, most frequent first, ties by id; each window's first token is left out."""
    ids, frequency = np.unique(windows[:, 1:], return_counts=True)
    return ids[np.lexsort((ids, -frequency))][:count].astype(np.int64)


def propose_prefixes(
    model: ReferenceModel, statistics: SpikeStatistics, bos: int, progress: Progress = silent
) -> list[ProposedPrefix]:
    """Search the best context for each of the worst module's spiking tokens; best rate first.

    Every candidate costs one batch of 200 sequences of 5 tokens through the layers up to the worst module's.

    Args:
        model: Unquantized, without a prefix.
        statistics: Of the same model without a prefix.
        bos: Beginning-of-sequence id.
        progress: Told after each candidate.
    """
    module = next(iter(statistics.ratios()))
    contexts = frequent_tokens(statistics.token_ids)
    candidates = spiking_tokens(statistics, module, bos)
    found = []
    with model.only_layers(split_name(module)[0] + 1):
        for done, token in enumerate(candidates, start=1):
            found.append(_best_context(model, module, bos, token, contexts))
            progress("candidate tokens", done, len(candidates))
    return sorted(found, key=lambda prefix: -prefix.rate)


def _best_context(
    model: ReferenceModel, module: str, bos: int, token: int, contexts: NDArray[np.int64]
) -> ProposedPrefix:
    columns = [np.full_like(contexts, bos), contexts, np.full_like(contexts, token)]
    sequences = np.stack([*columns, *columns[1:]], axis=1)  # [contexts, 5]: b x c x c
    scales = measure_spikes(model, sequences, modules=(module,)).modules[module].token_amax
    best = int(np.argmax(scales[:, 2] / np.maximum(scales[:, 4], np.finfo(np.float32).tiny)))
    return ProposedPrefix((bos, int(contexts[best]), token), float(scales[best, 2]), float(scales[best, 4]))


def worst_ratio(statistics: SpikeStatistics) -> tuple[str, float]:
    """Return the module with the highest max-median ratio, and that ratio."""
    return next(iter(statistics.ratios().items()))


def lowers_worst_ratio(ratio: float, without: float) -> bool:
    """Acceptance test: the prefix's worst ratio must lie below the one without a prefix."""
    return ratio < without


def distinct(prefixes: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return the prefixes in order, each once."""
    return list(dict.fromkeys(prefixes))
