"""What lm-evaluation-harness and the libraries below it say while they work, to the user and to others."""

import contextlib
import logging
from collections.abc import Iterator
from functools import partial

_TALKATIVE = ("lm_eval", "datasets", "huggingface_hub")


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """Within the block no progress bars and remarks are shown; what stops a task is raised.

    Nor does `datasets` report what it loads: it counts the use of its own file formats on a server.
    """
    import datasets
    from lm_eval.api import task

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.disable_progress_bars()
    levels = {name: logging.getLogger(name).level for name in _TALKATIVE}
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    bar = task.tqdm
    task.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        task.tqdm = bar
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
