"""What drafts from the text so far bring: an answer that repeats its prompt, and one that does not.

Run: python -m benchmarks.speed.speculation BUNDLE; of an instruction-tuned model, exported with --kv-cache static.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from spike_export.engines.engine import Engine
from spike_export.engines.generation.draft_length import DraftLength
from spike_export.engines.onnx_runtime.decoding import OnnxDecoding

CODE = '''def area(width, height):
    """Return the area of a rectangle."""
    if width < 0 or height < 0:
        raise ValueError("negative size")
    return width * height


def perimeter(width, height):
    """Return the perimeter of a rectangle."""
    if width < 0 or height < 0:
        raise ValueError("negative size")
    return 2 * (width + height)
'''

TASKS: dict[str, tuple[Any, dict[str, Any]]] = {
    "repeats its prompt": (
        [{"role": "user", "content": f"Repeat this code exactly, but rename width to w:\n{CODE}"}],
        {},
    ),
    "free text": (
        "Once upon a time, in a small village by the sea,",
        {"do_sample": True, "temperature": 0.9, "seed": 3},
    ),
}


def timed(engine: Engine, drafts: DraftLength | None, prompt: Any, options: dict[str, Any], tokens: int) -> float:
    """Return the seconds of one answer."""
    decoding = engine.decoding
    assert isinstance(decoding, OnnxDecoding), "a bundle"
    drafting = replace(engine, decoding=replace(decoding, drafts=drafts), encoder=engine.prompts)
    start = time.perf_counter()
    drafting.generate([prompt], max_new_tokens=tokens, ignore_eos=True, **options)
    return time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path, help="folder that export wrote with --kv-cache static")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args(arguments)
    with Engine.open(given.bundle, threads=given.threads) as engine:
        for name, (prompt, options) in TASKS.items():
            plain, drafted, drafts = [], [], DraftLength()
            for _ in range(given.rounds):
                plain.append(timed(engine, None, prompt, options, given.tokens))
                drafted.append(timed(engine, drafts, prompt, options, given.tokens))
            ratio = median(plain) / median(drafted)
            print(f"{name:20} {median(plain):6.2f} s  {median(drafted):6.2f} s with drafts: {ratio:.2f} x")
            print(f"{'':20} {drafts.accepted} of {drafts.drafted} drafted tokens accepted", flush=True)


if __name__ == "__main__":
    main()
