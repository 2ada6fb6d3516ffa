"""In the place of a process of its own, which imports the libraries for seconds before it measures anything."""

import pickle
from collections.abc import Callable
from typing import Any


def in_this_process(measure: Callable[..., Any], *arguments: object) -> Any:
    """Call a function as `benchmarks.peak_memory.in_own_process` does: all passes through pickle, to it and back."""
    called, given = pickle.loads(pickle.dumps((measure, arguments)))
    return pickle.loads(pickle.dumps(called(*given)))
