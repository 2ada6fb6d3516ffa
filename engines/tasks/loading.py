"""Tasks of lm-evaluation-harness, by name or from YAML files: loaded, and refused where they cannot be judged.

Importing this module needs the extra `lm-eval`.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

from spike_export.artifacts.errors import EngineError, one_line
from spike_export.engines.tasks.harness_model import LENGTHS
from spike_export.engines.tasks.harness_output import quiet_harness

_WRITES = "generate_until"
"""The kind of tasks whose answers are texts."""

ANSWERED = ("multiple_choice", "loglikelihood", _WRITES)
"""Kinds of tasks whose items are right or wrong."""

_DRAWS = ("do_sample", "temperature", "top_k", "top_p")
"""How a text is drawn; nothing of it matters where the most likely token is taken."""

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
            f"{name}: the task {task.config.task} is of the kind {kind}; --tasks judges {', '.join(ANSWERED)}"
        )
    if kind == _WRITES:
        _require_greedy(name, task)
    require = {"multiple_choice": _require_label, _WRITES: _require_target}.get(kind)
    if require is not None and not callable(task.config.process_results):
        for item, document in enumerate(task.eval_docs):
            require(name, task, item, document)


def _require_greedy(name: str, task: Any) -> None:
    """Refuse a task whose texts are drawn: two draws differ by chance, whatever quantization does."""
    wanted = task.config.generation_kwargs or {}
    if wanted.get("do_sample", float(wanted.get("temperature") or 0) > 0):
        raise EngineError(
            f"{name}: {task.config.task} draws its texts at random, and --tasks compares the most likely ones; set "
            "do_sample to false in generation_kwargs"
        )
    unknown = sorted(set(wanted) - {"until", *LENGTHS, *_DRAWS})
    if unknown:
        raise EngineError(f"{name}: generation_kwargs of {task.config.task} has {unknown[0]}, which no text here obeys")


def _require_label(name: str, task: Any, item: int, document: Any) -> None:
    """Refuse an item whose label names none of its choices: the harness would count it as a wrong answer."""
    with _templates_of(name, task, item):
        choices = task.doc_to_choice(document)
        label = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    for each in label if isinstance(label, list) else [label]:
        known = each in choices if isinstance(each, str) else isinstance(each, int) and 0 <= each < len(choices)
        if not known:
            raise EngineError(
                f"{name}: item {item} of {task.config.task} has the label {each!r}, which names none of its "
                f"{len(choices)} choices; correct the labels or doc_to_target"
            )


def _require_target(name: str, task: Any, item: int, document: Any) -> None:
    """Refuse an item without a right text: no field of the data, whose name would be the text, or an empty one."""
    with _templates_of(name, task, item):
        target = task.doc_to_target(document)
    if target is None or target in ("", [], task.config.doc_to_target):
        raise EngineError(
            f"{name}: item {item} of {task.config.task} has the target {target!r}, which is no answer; correct the "
            "data or doc_to_target"
        )


@contextmanager
def _templates_of(name: str, task: Any, item: int) -> Iterator[None]:
    """Refuse an item at whose data the task's templates fail within the block."""
    try:
        yield
    except Exception as error:  # templates raise whatever their expressions run into
        raise EngineError(f"{name}: item {item} of {task.config.task}: {one_line(error)}; correct the task") from error
