"""QFeP: find a short prefix that takes the activation spikes once, so that no later token spikes.

Source: arXiv 2405.14428, "quantization-free prefix". The search proposes `[b, x, c]`: BOS, a context token and the
token that spikes. The paper takes what it finds; here the proposals compete (prefix_choice).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.progress import Progress, silent
from spike_export.calibration.decoder.layerwise import BATCH_TOKENS, Decoder
from spike_export.calibration.statistics.measure import measure_spikes
from spike_export.calibration.statistics.spikes import SpikeStatistics
from spike_export.checkpoint.modules import expert_of, is_router, split_name

TOKENS_PER_SAMPLE = 3
CANDIDATES = 3
CONTEXTS = 200

MODULES = 2
"""Modules that propose prefixes; the paper's search looks at the worst one only."""

SPIKE_RATIO = 50.0
"""Max-median ratio from which on a further module proposes prefixes."""


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


def search_modules(statistics: SpikeStatistics, count: int = MODULES) -> tuple[str, ...]:
    """Return the modules whose spikes a prefix is searched for: the highest ratios, of different layers."""
    chosen: dict[int, str] = {}
    for module, ratio in statistics.ratios().items():
        if ratio > SPIKE_RATIO and not is_router(module):
            chosen.setdefault(split_name(module)[0], module)
    return tuple(chosen.values())[:count] or tuple(statistics.ratios())[:1]


def propose_prefixes(
    decoder: Decoder, statistics: SpikeStatistics, bos: int, progress: Progress = silent
) -> list[ProposedPrefix]:
    """Search the best context for each of the worst modules' spiking tokens; best rate first.

    Every candidate costs one batch of 200 sequences of 5 tokens through the layers up to its module's.

    Args:
        decoder: The model.
        statistics: Of the same model without a prefix.
        bos: Beginning-of-sequence id.
        progress: Told after each candidate.
    """
    contexts = frequent_tokens(statistics.token_ids)
    pairs = [
        (module, token)
        for module in search_modules(statistics)
        for token in spiking_tokens(statistics, module, bos, CANDIDATES)
    ]
    found = []
    for done, (module, token) in enumerate(pairs, start=1):
        found.append(_best_context(decoder, module, bos, token, contexts))
        progress("candidate tokens", done, len(pairs))
    return sorted(found, key=lambda prefix: -prefix.rate)


def _best_context(decoder: Decoder, module: str, bos: int, token: int, contexts: NDArray[np.int64]) -> ProposedPrefix:
    columns = [np.full_like(contexts, bos), contexts, np.full_like(contexts, token)]
    sequences = np.stack([*columns, *columns[1:]], axis=1)  # [contexts, 5]: b x c x c
    scales = _token_scales(decoder, module, sequences)
    best = int(np.argmax(scales[:, 2] / np.maximum(scales[:, 4], np.finfo(np.float32).tiny)))
    return ProposedPrefix((bos, int(contexts[best]), token), float(scales[best, 2]), float(scales[best, 4]))


def _token_scales(decoder: Decoder, module: str, sequences: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return each token's abs-max [sequences, tokens] at a module's input.

    An expert sees only the tokens that are routed to it: there the layer's output is looked at instead, to which a
    spike is added (as in the reference code).
    """
    layers = split_name(module)[0] + 1
    if expert_of(module) is None:
        measured = measure_spikes(decoder, sequences, (), (module,), layers=layers, batch_tokens=BATCH_TOKENS)
        return measured.modules[module].token_amax
    states = decoder.run(sequences, layers=layers, batch_tokens=BATCH_TOKENS)
    parts = [states.get(index).abs().amax(-1).float().cpu().numpy() for index in range(len(states))]
    return np.concatenate(parts)


def worst_ratio(statistics: SpikeStatistics) -> tuple[str, float]:
    """Return the module with the highest max-median ratio, and that ratio."""
    return next(iter(statistics.ratios().items()))


def lowers_worst_ratio(ratio: float, without: float) -> bool:
    """Acceptance test: the prefix's worst ratio must lie below the one without a prefix."""
    return ratio < without


def distinct(prefixes: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return the prefixes in order, each once."""
    return list(dict.fromkeys(prefixes))
