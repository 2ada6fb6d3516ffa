"""Plans of one bundle with static caches of several capacities: short sequences need not pay for long ones."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.errors import EngineError
from spike_export.engines.generation.decoding import DecodedStep
from spike_export.engines.generation.options import GenerationOptions
from spike_export.engines.tensorrt.decoding import TensorRtDecoding


class CapacityChoice:
    """Each batch goes to the plan with the least context that has room for it (see `decoding.Decoding`).

    Attention reads the whole buffer of a static cache in every step, so that a step costs as much as its plan's
    capacity, however short the sequences are. Every plan has its weights on the GPU.
    """

    def __init__(self, runtimes: Sequence[TensorRtDecoding]) -> None:
        """Choose between these, of the same model.

        Raises:
            EngineError: There is none, or they have different vocabularies.
        """
        if len({runtime.vocab for runtime in runtimes}) != 1:
            raise EngineError("the plans to choose between are not of one model; open plans of one bundle")
        self._runtimes = sorted(runtimes, key=lambda runtime: runtime.limits.context)

    def decode(self, prompts: Sequence[NDArray[np.int64]], options: GenerationOptions) -> Iterator[DecodedStep]:
        """See `Decoding`. The plan with the most context says what does not fit into any."""
        needed = max((len(prompt) for prompt in prompts), default=0) + options.max_new_tokens - 1
        for runtime in self._runtimes:
            limits = runtime.limits
            if needed <= limits.context and limits.smallest_batch <= len(prompts) <= limits.largest_batch:
                return runtime.decode(prompts, options)
        return self._runtimes[-1].decode(prompts, options)

    def close(self) -> None:
        """Close every plan."""
        for runtime in self._runtimes:
            runtime.close()
