"""Windows that the processes of a cluster work on at the same time: the bits are those of one process.

A process gets whole forward batches, so that no product has another shape than it would have in one process.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from spike_export.calibration.decoder.layerwise import BATCH_TOKENS, batch_size

Result = TypeVar("Result")


class Workers(Protocol):
    """Processes that each hold a calibration of the same model with the same options."""

    @property
    def count(self) -> int:
        """Number of processes."""

    def results(self, work: Callable[..., Result], calls: Sequence[tuple[Any, ...]]) -> list[Result]:
        """Call `work` with a process's `Calibration` and one of the arguments, for each of `calls`.

        Returns:
            The results in the order of the calls.
        """


def window_parts(windows: int, tokens: int, processes: int) -> list[slice]:
    """Divide windows of so many tokens, each as it is fed, into a part for each process, or fewer."""
    size = batch_size(tokens, BATCH_TOKENS)
    batches = -(-windows // size)
    step = size * -(-batches // processes)
    return [slice(start, min(start + step, windows)) for start in range(0, windows, step)]
