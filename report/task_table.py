"""Standard tasks for the reader: a row for each task and metric, and what the figures mean."""

from spike_export.artifacts.results.task_document import TaskAccuracy, TaskRow
from spike_export.artifacts.visible_text import visible

TASK_HEADINGS = ("task", "metric", "items", "bundle", "model", "difference", "p", "flips")
"""Bundle and model are accuracies; the model is the unquantized one behind the same prefix."""


def task_rows(found: TaskAccuracy | None) -> list[tuple[str, ...]]:
    """Return one row for each task and metric under `TASK_HEADINGS`."""
    return [] if found is None else [_row(row) for row in found.tasks]


def _row(row: TaskRow) -> tuple[str, ...]:
    low, high = row.difference_interval
    return (
        visible(row.task),
        visible(row.metric),
        str(row.items),
        f"{100 * row.accuracy:.2f} %",
        f"{100 * row.reference_accuracy:.2f} %",
        f"{100 * row.difference:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})",
        f"{row.p_value:.2g}",
        f"{100 * row.flips:.2f} %",
    )


def task_sentence(found: TaskAccuracy) -> str:
    """Return how to read the rows."""
    return (
        f"lm-evaluation-harness {visible(found.lm_eval)} asks the bundle in ONNX Runtime, and the unquantized model "
        "behind the same prefix in float32. The difference is in percentage points, with its 95 % interval; p is "
        "McNemar's exact test; flips are the answers that quantization turns right or wrong."
    )


def task_gates(found: TaskAccuracy) -> list[tuple[bool, str]]:
    """Return for each row whether it keeps the limit, and a sentence; nothing without a limit."""
    if found.max_flips is None:
        return []
    missed = found.missed
    return [(row not in missed, _gate(row, found.max_flips, row not in missed)) for row in found.tasks]


def _gate(row: TaskRow, limit: float, passed: bool) -> str:
    return (
        f"{'passed' if passed else 'MISSED'}: max-flips, {visible(row.task)}, {visible(row.metric)}: the 95 % interval "
        f"ends at {100 * row.flips_interval[1]:.2f} %, limit {100 * limit:.2f} %"
    )
