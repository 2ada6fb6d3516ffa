"""Whether a bundle's rope rotates a token by more than its position, so that a prompt cannot be read in parts."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spike_export.artifacts.errors import EngineError, one_line
from spike_export.artifacts.files.documents import read_document
from spike_export.export.cache_options import LENGTH_DEPENDENT_ROPES

_CONFIG_FILE = "config.json"


def rope_by_length(bundle: Path) -> str | None:
    """Return the rope type that depends on a sequence's length, or None where every rope depends on the position only.

    Raises:
        EngineError: The bundle's `config.json` is damaged. A bundle made by hand may have none.
    """
    path = bundle / _CONFIG_FILE
    if not path.exists():
        return None
    try:
        ropes: Mapping[str, Any] = json.loads(read_document(path))["rope_parameters"]
        # One rope, or one per kind of layer.
        kinds = [rope for rope in ropes.values() if isinstance(rope, Mapping)] or [ropes]
        found = sorted({str(rope["rope_type"]) for rope in kinds} & LENGTH_DEPENDENT_ROPES)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise EngineError(
            f"{path}: cannot read the model's rope ({one_line(error)}); export the bundle again"
        ) from error
    return found[0] if found else None
