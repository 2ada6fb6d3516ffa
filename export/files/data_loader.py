"""Inputs of this bundle's graph for Polygraphy, which calls `load_data`: random tokens as fresh sequences.

polygraphy run model.onnx --onnxrt --data-loader-script data_loader.py
"""

# This file is copied into every bundle: it imports nothing of spike-export.

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

BATCH, TOKENS, CALLS = 1, 16, 2


def load_data() -> Iterator[dict[str, Any]]:
    """Yield the inputs of calls, by name; `manifest.json` beside this file says which there are."""
    manifest = json.loads((Path(__file__).parent / "manifest.json").read_text(encoding="utf-8"))
    draw = np.random.default_rng(0)
    sizes = {"batch": BATCH, "sequence": TOKENS, "total_sequence": TOKENS, "fresh": 1}
    for _ in range(CALLS):
        feeds = {}
        for value in manifest["inputs"]:
            # A size that is not listed is that of an empty past.
            shape = [size if isinstance(size, int) else sizes.get(size, 0) for size in value["shape"]]
            feeds[value["name"]] = np.zeros(shape, value["dtype"])
        feeds["input_ids"] = draw.integers(0, manifest["vocab_size"], (BATCH, TOKENS))
        for name in ("attention_mask", "fresh"):
            if name in feeds:
                feeds[name][...] = 1
        yield feeds
