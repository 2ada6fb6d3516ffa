"""A source file with one change."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A source file with one change.

    Attributes:
        file: Relative to the repository.
        lines: First and last line of the changed statement.
        before: The changed lines as they are.
        after: The same lines of the mutant.
        source: The whole mutant.
    """

    file: str
    lines: tuple[int, int]
    before: str
    after: str
    source: str

    @property
    def module(self) -> str:
        """The name under which the file is imported."""
        return "spike_export." + self.file.removesuffix(".py").replace("/", ".")
