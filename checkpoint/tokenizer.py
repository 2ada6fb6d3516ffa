"""A model's tokenizer: loaded from files of anybody's, and asked for tokens."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spike_export.artifacts.errors import SpikeExportError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PANIC = "PanicException"
"""What the package tokenizers raises where its native code fails; no Exception, and without a public name."""

_STDERR = 2

_REMEDY = "download the tokenizer's files again, or take another model"


@contextmanager
def tokenizer_faults(error: type[SpikeExportError], what: str) -> Iterator[None]:
    """Turn whatever a damaged tokenizer raises in the block into one line.

    Args:
        error: What to raise.
        what: What could not be done, with its place, for the message.
    """
    try:
        yield
    except (SpikeExportError, MemoryError):
        raise
    except Exception as fault:
        raise error(f"{what}: {one_line(fault)}; {_REMEDY}") from fault
    except BaseException as fault:
        if type(fault).__name__ != _PANIC:
            raise
        raise error(f"{what}: its native code fails ({one_line(fault)}); {_REMEDY}") from fault


@contextmanager
def loading_tokenizer(error: type[SpikeExportError], place: Path) -> Iterator[None]:
    """Turn whatever damaged files of a tokenizer raise in the block into one line, and nothing else is printed.

    Args:
        error: What to raise.
        place: Where the files lie.
    """
    with tokenizer_faults(error, f"{place}: cannot load the tokenizer"), _silence():
        yield


@contextmanager
def _silence() -> Iterator[None]:
    """Keep what native code says of its failure off the terminal: the failure itself is told in one line."""
    try:
        kept = os.dup(_STDERR)
    except OSError:  # standard error is closed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, _STDERR)
        yield
    finally:
        os.dup2(kept, _STDERR)
        os.close(kept)
        os.close(nowhere)


def _try(tokenizer: Any) -> None:
    """Use a tokenizer as it is used later: its configuration may hold values that loading does not look at."""
    tokenizer.decode(tokenizer.encode("a"))
    templates = tokenizer.chat_template
    for template in templates.values() if isinstance(templates, dict) else (templates,):
        if template is not None and not isinstance(template, str):
            raise TypeError(f"the chat template is of the type {type(template).__name__}, not a text")
    json.dumps([tokenizer.init_kwargs, tokenizer.chat_template], default=str, ensure_ascii=False).encode()


def load_tokenizer(load: Callable[[], Any], place: Path, error: type[SpikeExportError]) -> "PreTrainedTokenizerBase":
    """Load a tokenizer of the package tokenizers.

    Args:
        load: Loads it by means of transformers.
        place: Where it lies.
        error: What to raise.

    Raises:
        SpikeExportError: Of the given type: the files are damaged, or the tokenizer is written in Python, which no
            other runtime can use.
    """
    with loading_tokenizer(error, place):
        tokenizer: PreTrainedTokenizerBase = load()
        _try(tokenizer)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise error(
            f"{place}: {type(tokenizer).__name__} has no form as tokenizer.json; convert the tokenizer, or take "
            "another model"
        )
    return tokenizer
