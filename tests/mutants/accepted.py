"""Mutants that no test has to notice, each with its reason."""

import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.mutant import Mutant

LIST = Path(__file__).parent / "accepted.toml"


@dataclass(frozen=True)
class Accepted:
    """A mutant by its changed lines.

    Attributes:
        file: Relative to the repository.
        before: The changed lines as they are, without their indentation.
        after: The same lines of the mutant.
        reason: Why the program is as good as before.
    """

    file: str
    before: str
    after: str
    reason: str

    def is_of(self, mutant: Mutant) -> bool:
        """Return whether this is the mutant."""
        return (self.file, self.before, self.after) == (mutant.file, mutant.before, mutant.after)


def load_accepted(path: Path = LIST) -> list[Accepted]:
    """Return the entries of the list."""
    return [Accepted(**entry) for entry in tomllib.loads(path.read_text(encoding="utf-8")).get("mutant", [])]


def stale(accepted: Iterable[Accepted], root: Path) -> Sequence[Accepted]:
    """Return the entries whose lines no longer stand in their file: they excuse nothing, or something else one day."""
    return [entry for entry in accepted if not _stands(entry, root / entry.file)]


def _stands(entry: Accepted, path: Path) -> bool:
    if not path.is_file():
        return False
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    wanted = entry.before.splitlines()
    return any(lines[start : start + len(wanted)] == wanted for start in range(len(lines)))
