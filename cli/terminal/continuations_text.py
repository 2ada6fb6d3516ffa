"""Continuations for the reader, one above the other, with the token at which they part."""

from rich.console import Console

from spike_export.artifacts.visible_text import visible
from spike_export.cli.terminal.lines import print_lines
from spike_export.engines.accuracy.continuations import Continuations

_EXCERPT = 60
"""Characters of the prompt's end that are shown."""


def print_continuations(found: Continuations, console: Console) -> None:
    """Print how many are equal, and each prompt's end with both continuations."""
    print_lines(console, f"{found.equal} of {len(found.rows)} continuations of {found.tokens} tokens are equal")
    for row in found.rows:
        prompt, ours, theirs = row.texts
        place = "equal" if row.divergence is None else f"they part at token {row.divergence + 1}"
        lines = [f"... {visible(prompt)[-_EXCERPT:]}  ({place})", f"  bundle: {visible(ours)}"]
        if row.divergence is not None:
            lines.append(f"  model:  {visible(theirs)}")
        print_lines(console, *lines)
