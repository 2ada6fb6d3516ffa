"""What checks keep of unquantized models for the next check: in the user's cache folder, up to a few GB."""

import os
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from spike_export.calibration.decoder.layerwise import Execution
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.engines.accuracy.reference_cache import ReferenceCache
from spike_export.pipeline.run_directory import stage_key

CACHE_VARIABLE = "SPIKE_EXPORT_CACHE"
"""Names the cache folder; empty for none."""

_LIMIT = 4 << 30


def reference_cache(checkpoint: Checkpoint, execution: Execution, *, force: bool = False) -> ReferenceCache | None:
    """Return the cache of a model's predictions; None where the user wants none.

    Args:
        checkpoint: The model.
        execution: Precision and devices round what the model predicts.
        force: Compute everything anew.
    """
    folder = _cache_folder()
    if folder is None:
        return None
    key = stage_key(
        tool=version("spike-export"),
        torch=version("torch"),
        weights=checkpoint.tensors.sha256(),
        config=asdict(checkpoint.config),
        compute=[execution.dtype, execution.devices[0].partition(":")[0]],
    )
    return ReferenceCache(folder / "references", key, _LIMIT, fresh=force)


def _cache_folder() -> Path | None:
    """Return the folder that the environment names, by default the one for spike-export among the user's caches."""
    named = os.environ.get(CACHE_VARIABLE)
    if named is not None:
        return Path(named) if named else None
    caches = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(caches) if caches else Path.home() / ".cache") / "spike-export"
    except RuntimeError:  # a user without a home
        return None
