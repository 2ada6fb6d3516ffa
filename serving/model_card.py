"""What is known of the model that is served: its formats, its prefix, its accuracy, where it runs."""

from pathlib import Path
from typing import Any

from spike_export.artifacts.errors import ArtifactError
from spike_export.artifacts.manifest import Manifest
from spike_export.artifacts.results.check_document import Check, load_check

CHECK_FILE = "check.json"
"""Stands beside the bundle in the run directory of the main job."""


def model_card(bundle: Path, manifest: Manifest, model: str, context: int, rows: int, runtime: str) -> dict[str, Any]:
    """Return the card as values for JSON; what is not known is None."""
    return {
        "model": model,
        "source": manifest.model.source,
        "architecture": manifest.model.architecture,
        "linears": {name: share.mac_share for name, share in manifest.linears.items()},
        "head": None if manifest.head is None else manifest.head.format,
        "rest": manifest.dtype,
        "prefix": None if manifest.prefix is None else manifest.prefix.text,
        "cache": manifest.kv_cache,
        "cache_type": manifest.cache_type,
        "context": context,
        "rows": rows,
        "runtime": runtime,
        "accuracy": _accuracy(bundle),
    }


def _accuracy(bundle: Path) -> dict[str, Any] | None:
    """Return what the check of the run found, where the bundle lies in a run directory."""
    try:
        check: Check = load_check(bundle.resolve().parent / CHECK_FILE)
    except ArtifactError:
        return None
    if check.shipped is None:
        return None
    return {
        "perplexity": check.shipped.perplexity,
        "unquantized": check.reference.behind_prefix or check.reference.perplexity,
        "agreement": check.shipped.top1_agreement,
        "corpus": check.corpus.name,
    }
