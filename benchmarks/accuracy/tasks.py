"""PIQA and CommonsenseQA, all items: a bundle's answers beside those of the unquantized model behind the same prefix.

The data sets' files are not shipped: `piqa-dev.jsonl` and `piqa-dev-labels.lst` are PIQA's validation set as its
authors give it, `commonsenseqa-valid.jsonl` is CommonsenseQA's. PIQA is asked as lm-evaluation-harness asks it.
CommonsenseQA is asked like PIQA: without the list of its choices, of which the likeliest is taken.
Run: python -m benchmarks.accuracy.tasks --bundle RUN/bundle --data FOLDER [--model PATH|gemma3] [--task piqa]
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.fetch_models import MODELS, model_path
from spike_export.cli.terminal.progress_display import ProgressDisplay
from spike_export.cli.terminal.task_table import print_task_accuracy
from spike_export.pipeline.checking.tasks import task_accuracy

_QUESTION = "Question: {{question}}\nAnswer:"


def piqa(data: Path) -> Iterator[Mapping[str, Any]]:
    """Yield PIQA's items: two ways to reach a goal."""
    labels = (data / "piqa-dev-labels.lst").read_text(encoding="utf-8").split()
    for line, label in zip(_lines(data / "piqa-dev.jsonl"), labels, strict=True):
        item = json.loads(line)
        yield {"question": item["goal"], "choices": [item["sol1"], item["sol2"]], "label": int(label)}


def commonsenseqa(data: Path) -> Iterator[Mapping[str, Any]]:
    """Yield CommonsenseQA's items: five words or phrases."""
    for line in _lines(data / "commonsenseqa-valid.jsonl"):
        item = json.loads(line)
        choices = item["question"]["choices"]
        label = [choice["label"] for choice in choices].index(item["answerKey"])
        yield {"question": item["question"]["stem"], "choices": [choice["text"] for choice in choices], "label": label}


TASKS = {"piqa": piqa, "commonsenseqa": commonsenseqa}


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def write_task(name: str, data: Path, folder: Path) -> Path:
    """Write a task's items and its task file into a folder; return the task file."""
    records = folder / f"{name}.jsonl"
    records.write_text("".join(json.dumps(item) + "\n" for item in TASKS[name](data)), encoding="utf-8")
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(records)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": _QUESTION,
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": metric, "aggregation": "mean"} for metric in ("acc", "acc_norm")],
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets' files")
    parser.add_argument("--model", default="smollm2", help="a checkpoint's path, or smollm2 (default) or gemma3")
    parser.add_argument("--task", action="append", choices=list(TASKS), help="all by default")
    parser.add_argument("--items", type=int, help="only the first items of each task")
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()
    given = arguments.model
    model = str(model_path(MODELS[given])) if given in MODELS else given
    console = Console()
    with tempfile.TemporaryDirectory() as name:
        files = [str(write_task(task, arguments.data, Path(name))) for task in arguments.task or TASKS]
        with ProgressDisplay(console, ["tasks"]) as display, display.stage("tasks") as progress:
            found = task_accuracy(
                arguments.bundle, model, files, items=arguments.items, out=arguments.json, progress=progress
            )
    print_task_accuracy(found, console)


if __name__ == "__main__":
    main()
