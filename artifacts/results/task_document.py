"""The content of `BUNDLE.tasks.json`: what quantization does to the answers of standard tasks."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from spike_export.artifacts.files.json_document import load_document

TASK_KEYS = ("format", "lm_eval", "tasks")
"""Which every such document has."""

Share = Annotated[float, Field(ge=0, le=1)]


class _Part(BaseModel):
    """A part of the document; keys of a newer writer are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class TaskRow(_Part):
    """One metric of one task; intervals are of 95 %.

    Attributes:
        metric: Such as `acc`, or `acc_norm`, which divides a choice's log-likelihood by its length.
        items: How many were asked.
        accuracy: Share that the bundle answers right.
        reference_accuracy: Share that the unquantized model behind the same prefix answers right.
        difference: The first less the second.
        p_value: Of McNemar's exact test that quantization turns as many answers wrong as right.
        flips: Share of answers that quantization turns right or wrong.
        lost: Items, counted from 0, that the unquantized model alone answers right.
        gained: Items that the bundle alone answers right.
    """

    task: str
    metric: str
    items: int
    accuracy: Share
    reference_accuracy: Share
    difference: float
    difference_interval: tuple[float, float]
    p_value: Share
    flips: Share
    flips_interval: tuple[Share, Share]
    lost: tuple[int, ...] = ()
    gained: tuple[int, ...] = ()


class TaskAccuracy(_Part):
    """All tasks of one check.

    Attributes:
        lm_eval: Version of lm-evaluation-harness.
        checkpoint_sha256: Of the model's weight files.
        recipe_sha256: Of the recipe that the bundle was made by; None for a bundle without quantization.
        prefix: Token ids before every text, of both models.
        max_flips: Limit for the share of flips; None for no limit.
        tasks: In the order in which they were given, and each task's metrics in the harness's.
    """

    format: Literal[1] = 1
    lm_eval: str
    checkpoint_sha256: str
    recipe_sha256: str | None
    prefix: tuple[int, ...] = ()
    max_flips: Share | None = None
    tasks: tuple[TaskRow, ...]

    @property
    def missed(self) -> tuple[TaskRow, ...]:
        """The rows whose interval of flips does not keep the limit."""
        limit = self.max_flips
        return tuple(row for row in self.tasks if limit is not None and row.flips_interval[1] > limit)

    @property
    def passed(self) -> bool:
        """Whether every row keeps the limit."""
        return not self.missed

    def document(self) -> dict[str, Any]:
        """Return the result as JSON's values."""
        return self.model_dump(mode="json") | {"passed": self.passed}


def task_place(bundle: Path) -> Path:
    """Return where the tasks of a bundle stand: beside its folder."""
    named = bundle if bundle.name else bundle.absolute()
    return named.parent / f"{named.name}.tasks.json"


def load_task_accuracy(path: Path) -> TaskAccuracy:
    """Read `BUNDLE.tasks.json`.

    Raises:
        ArtifactError: The file is missing, not JSON, or not of this kind.
    """
    return load_document(path, TaskAccuracy, "run check --tasks again")
