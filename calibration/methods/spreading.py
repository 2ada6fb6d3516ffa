"""Windows that the processes of a cluster work on at the same time: the bits are those of one process.

A process gets whole forward batches, so that no product has another shape than it would have in one process.
"""

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, Protocol, TypeVar

from spike_export.artifacts.progress import Progress
from spike_export.calibration.decoder.layerwise import BATCH_TOKENS, batch_size

Result = TypeVar("Result")


def unheard(_number: int) -> None:
    """Tell nobody that a call is done."""


class Workers(Protocol):
    """Processes that each hold a calibration of the same model with the same options."""

    @property
    def count(self) -> int:
        """Number of processes."""

    def results(
        self, work: Callable[..., Result], calls: Sequence[tuple[Any, ...]], done: Callable[[int], None] = unheard
    ) -> list[Result]:
        """Call `work` with a process's `Calibration` and one of the arguments, for each of `calls`.

        Args:
            work: A function at the top of its module.
            calls: Arguments.
            done: Told the number of each call that is done.

        Returns:
            The results in the order of the calls.
        """


def window_parts(windows: int, tokens: int, processes: int) -> list[slice]:
    """Divide windows of so many tokens, each as it is fed, into a part for each process, or fewer."""
    size = batch_size(tokens, BATCH_TOKENS)
    batches = -(-windows // size)
    step = size * -(-batches // processes)
    return [slice(start, min(start + step, windows)) for start in range(0, windows, step)]


def even_parts(items: int, processes: int) -> list[slice]:
    """Divide windows that are run one by one, or layers, into a part for each process, or fewer."""
    step = -(-items // processes)
    return [slice(start, min(start + step, items)) for start in range(0, items, step)]


def telling(progress: Progress, what: str, parts: Sequence[slice]) -> Callable[[int], None]:
    """Return what tells of all items of a part, which are `what`, once the part is done, given its number."""
    counted = count(1)

    def told(number: int) -> None:
        for _ in range(parts[number].start, parts[number].stop):
            progress(what, next(counted), parts[-1].stop)

    return told
