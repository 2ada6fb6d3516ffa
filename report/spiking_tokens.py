"""The tokens that spike: for each module the strongest occurrences."""

from dataclasses import dataclass

import numpy as np

from spike_export.calibration.statistics.spikes import SpikeStatistics

TOP_TOKENS = 20
TOKENS_PER_MODULE = 3


@dataclass(frozen=True)
class SpikingToken:
    """One (module, token) pair with a large activation."""

    module: str
    token_id: int
    position: int
    amax: float
    ratio: float


def spiking_tokens(statistics: SpikeStatistics, top: int = TOP_TOKENS) -> list[SpikingToken]:
    """Return the (module, token) pairs that stand out most from their sample's median token.

    Of each token id only its strongest occurrence in a module counts, and a module gives no more than
    `TOKENS_PER_MODULE`, so that one module does not fill the list.
    """
    found = [token for name in list(statistics.ratios())[:top] for token in _module_tokens(statistics, name)]
    return sorted(found, key=lambda token: -token.ratio)[:top]


def _module_tokens(statistics: SpikeStatistics, name: str) -> list[SpikingToken]:
    spikes = statistics.modules[name]
    amax, ratios = spikes.token_amax, spikes.token_ratios.ravel()
    seen = np.flatnonzero(~np.isnan(ratios))  # a mixture's router sends an expert some of the tokens only
    order = seen[np.argsort(-ratios[seen], kind="stable")]
    _, first = np.unique(statistics.token_ids.ravel()[order], return_index=True)
    strongest = order[np.sort(first)[:TOKENS_PER_MODULE]]
    return [
        SpikingToken(
            module=name,
            token_id=int(statistics.token_ids.ravel()[index]),
            position=int(index % amax.shape[1]),
            amax=float(amax.ravel()[index]),
            ratio=float(ratios[index]),
        )
        for index in strongest
    ]
