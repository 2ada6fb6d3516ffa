"""What became of the inputs of one format."""

from dataclasses import dataclass

HEADINGS = ("format", "tried", "accepted", "refused", "failed")


@dataclass
class Tally:
    """Counts of inputs; an input whose reader has not ended counts as failed."""

    name: str
    accepted: int = 0
    refused: int = 0
    failed: int = 0

    @property
    def row(self) -> tuple[str, int, int, int, int]:
        """What stands under `HEADINGS`."""
        return self.name, self.accepted + self.refused + self.failed, self.accepted, self.refused, self.failed


def table(rows: list[tuple[str, int, int, int, int]]) -> list[str]:
    """Return the lines of a table with a sum below."""
    total = ("all", *(sum(row[column] for row in rows) for column in range(1, 5)))
    width = max(len(str(row[0])) for row in (*rows, total))
    return ["  ".join([f"{row[0]:{width}}", *(f"{cell:>8}" for cell in row[1:])]) for row in (HEADINGS, *rows, total)]
