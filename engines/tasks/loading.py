"""Tasks of lm-evaluation-harness, by name or from YAML files: loaded, and refused where they cannot be judged.

Importing this module needs the extra `lm-eval`.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

from spike_export.artifacts.errors import EngineError, one_line
from spike_export.engines.tasks.harness_output import quiet_harness

ANSWERED = ("multiple_choice", "loglikelihood")
"""Kinds of tasks whose items are right or wrong by likelihoods alone."""

_FILES = (".yaml", ".yml")


def load_tasks(names: Sequence[str]) -> dict[str, Any]:
    """Return tasks by their names, those of groups and tags one by one.

    Args:
        names: Tasks, groups or tags that the harness ships, or YAML files.

    Raises:
        EngineError: Names the task that is unknown, malformed, without data or labels, or of a kind that has no right
            answers.
    """
    files = [name for name in names if Path(name).suffix in _FILES]
    for file in files:
        if not Path(file).is_file():
            raise EngineError(f"{file}: no such file; give the YAML file of a task")
    with quiet_harness():
        # The harness reads all its thousands of files to know their names.
        manager = TaskManager(include_defaults=len(files) < len(names))
        loaded = {name: _loaded(manager, name) for name in names}
    found: dict[str, Any] = {}
    for name in names:
        for task in loaded[name].values():
            _require_answers(name, task)
            if task.config.task in found:
                raise EngineError(f"--tasks gives the task {task.config.task} twice; leave one out")
            found[task.config.task] = task
    return found


def _loaded(manager: TaskManager, name: str) -> dict[str, Any]:
    if Path(name).suffix not in _FILES and name not in manager.task_index:
        raise EngineError(f"{name}: lm-evaluation-harness has no task of this name; name one, or a YAML file")
    try:
        tasks: dict[str, Any] = manager.load(name)["tasks"]
    except Exception as error:  # the harness, its YAML reader, Jinja and data sets each have their own
        raise EngineError(f"{name}: {_fault(error)}") from error
    if not tasks:
        raise EngineError(f"{name}: holds no task; name one, or a YAML file")
    return tasks


def _fault(error: Exception) -> str:
    """Return what a task's loading failed at, and what to do."""
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if unknown:
        return f"the task has a field {unknown[1]!r}, which lm-evaluation-harness does not know; correct or remove it"
    if isinstance(error, OSError) or type(error).__module__.startswith(("datasets", "huggingface_hub", "httpx")):
        return (
            f"the task's data cannot be read ({one_line(error)}); correct its dataset_path and data_files, or connect "
            "to the network"
        )
    return f"lm-evaluation-harness cannot load the task ({one_line(error)}); correct it"


def _require_answers(name: str, task: Any) -> None:
    """Refuse a task whose items are not right or wrong, or one without labels."""
    kind = task.OUTPUT_TYPE
    if kind not in ANSWERED:
        raise EngineError(
            f"{name}: the task {task.config.task} is of the kind {kind}; --tasks judges {' and '.join(ANSWERED)}"
        )
    if kind == "multiple_choice" and not callable(task.config.process_results):
        for item, document in enumerate(task.eval_docs):
            _require_label(name, task, item, document)


def _require_label(name: str, task: Any, item: int, document: Any) -> None:
    """Refuse an item whose label names none of its choices: the harness would count it as a wrong answer."""
    try:
        choices = task.doc_to_choice(document)
        label = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    except Exception as error:  # templates raise whatever their expressions run into
        raise EngineError(f"{name}: item {item} of {task.config.task}: {one_line(error)}; correct the task") from error
    for each in label if isinstance(label, list) else [label]:
        known = each in choices if isinstance(each, str) else isinstance(each, int) and 0 <= each < len(choices)
        if not known:
            raise EngineError(
                f"{name}: item {item} of {task.config.task} has the label {each!r}, which names none of its "
                f"{len(choices)} choices; correct the labels or doc_to_target"
            )
