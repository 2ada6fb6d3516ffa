"""Tasks evaluated by lm-evaluation-harness for two models, and the answers of both side by side.

Importing this module needs the extra `lm-eval`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.evaluator import evaluate
from numpy.typing import NDArray

from spike_export.artifacts.errors import EngineError, SpikeExportError, one_line
from spike_export.artifacts.results.task_document import TaskRow
from spike_export.engines.tasks.harness_model import HarnessModel
from spike_export.engines.tasks.harness_output import quiet_harness
from spike_export.engines.tasks.outcomes import Outcomes

_FEWSHOT_SEED = 1234
"""The harness's own default."""

Right = Mapping[tuple[str, str], NDArray[np.bool_]]
"""Task, metric → which items [items] a model answers right."""


def compared(
    tasks: Mapping[str, Any], bundle: HarnessModel, reference: HarnessModel, items: int | None = None
) -> tuple[TaskRow, ...]:
    """Evaluate tasks for a bundle and for the unquantized model, one after the other.

    Args:
        tasks: As `load_tasks` returns them.
        bundle: The quantized model.
        reference: The unquantized one.
        items: Only so many of each task's items, the first ones.

    Raises:
        EngineError: A model fails, or no metric says of each item whether it is right.
    """
    ours = _answers(tasks, bundle, items)
    judged = {task for task, _ in ours}
    missing = [task for task in tasks if task not in judged]
    if missing:
        raise EngineError(
            f"the task {missing[0]} has no metric that is 0 or 1 for every item, as acc is; add one to its metric_list"
        )
    theirs = _answers(tasks, reference, items)
    return tuple(_row(*key, right, theirs[key]) for key, right in ours.items() if key in theirs)


def _row(task: str, metric: str, bundle: NDArray[np.bool_], reference: NDArray[np.bool_]) -> TaskRow:
    outcomes = Outcomes.of(bundle, reference)
    lost, gained = (tuple(map(int, np.flatnonzero(each))) for each in (~bundle & reference, bundle & ~reference))
    return TaskRow(
        task=task,
        metric=metric,
        items=outcomes.items,
        accuracy=outcomes.accuracy,
        reference_accuracy=outcomes.reference_accuracy,
        difference=outcomes.difference,
        difference_interval=outcomes.difference_interval,
        p_value=outcomes.p_value,
        flips=outcomes.flips,
        flips_interval=outcomes.flips_interval,
        lost=lost,
        gained=gained,
    )


def _answers(tasks: Mapping[str, Any], model: HarnessModel, items: int | None) -> Right:
    for task in tasks.values():
        # Each model is shown the same examples.
        task.set_fewshot_seed(_FEWSHOT_SEED)
    try:
        with quiet_harness():
            samples = evaluate(model, {"tasks": dict(tasks)}, limit=items, bootstrap_iters=0)["samples"]
    except SpikeExportError:
        raise
    except Exception as error:  # templates and functions of the tasks raise whatever they run into
        if model.computing:  # a fault of the program
            raise
        raise EngineError(f"lm-evaluation-harness cannot judge the tasks ({one_line(error)}); correct them") from error
    return {(task, metric): right for task in tasks for metric, right in _verdicts(samples[task])}


def _verdicts(samples: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Yield the metrics that are 0 or 1 for every item, with the items in their order."""
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    for name in filters:
        chosen = sorted((each for each in samples if each["filter"] == name), key=lambda each: int(each["doc_id"]))
        for metric in chosen[0]["metrics"]:
            values = [sample[metric] for sample in chosen]
            if all(isinstance(value, (bool, int, float)) and value in (0, 1) for value in values):
                yield metric if len(filters) == 1 else f"{metric},{name}", np.array(values, np.bool_)
