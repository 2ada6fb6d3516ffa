"""The task files of the benchmark hold the data sets' items, each with its right answer."""

import json
from pathlib import Path

import pytest

from benchmarks.accuracy.tasks import write_task


@pytest.fixture
def data(tmp_path: Path) -> Path:
    piqa = [{"goal": "Boil water", "sol1": "in a pot", "sol2": "in a sieve"}, {"goal": "b", "sol1": "c", "sol2": "d"}]
    words = {"A": "bank", "B": "mall", "C": "sea", "D": "x", "E": "y"}
    choices = [{"label": label, "text": text} for label, text in words.items()]
    question = {"answerKey": "C", "question": {"stem": "Where do ships go?", "choices": choices}}
    (tmp_path / "piqa-dev.jsonl").write_text("".join(json.dumps(item) + "\n" for item in piqa))
    (tmp_path / "piqa-dev-labels.lst").write_text("0\n1\n")
    (tmp_path / "commonsenseqa-valid.jsonl").write_text(json.dumps(question) + "\n")
    return tmp_path


def items(path: Path) -> list[dict[str, object]]:
    (file,) = json.loads(path.read_text())["dataset_kwargs"]["data_files"].values()
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def test_both_sets_become_questions_with_choices_and_a_label(data: Path) -> None:
    first, second = items(write_task("piqa", data, data))
    assert first == {"question": "Boil water", "choices": ["in a pot", "in a sieve"], "label": 0}
    assert second["label"] == 1
    (item,) = items(write_task("commonsenseqa", data, data))
    assert (item["question"], item["choices"], item["label"]) == (
        "Where do ships go?",
        ["bank", "mall", "sea", "x", "y"],
        2,
    )


def test_a_label_for_every_item_is_required(data: Path) -> None:
    (data / "piqa-dev-labels.lst").write_text("0\n")
    with pytest.raises(ValueError, match="shorter"):
        write_task("piqa", data, data)
