"""Standard tasks in the report: the figures of the bundle's own document, the limit, and what is left out."""

import json
from pathlib import Path

import pytest

from spike_export.artifacts.results.task_document import TaskAccuracy, TaskRow, load_task_accuracy, task_place
from spike_export.report.task_table import TASK_HEADINGS, task_gates, task_rows
from tests.report.test_page import read, write_run
from tests.support.blank_pictures import pictures_left_blank

ROW = TaskRow(
    task="piqa<b>",
    metric="acc",
    items=1838,
    accuracy=0.6723,
    reference_accuracy=0.6801,
    difference=-0.0078,
    difference_interval=(-0.0151, -0.0004),
    p_value=0.0412,
    flips=0.0256,
    flips_interval=(0.0193, 0.0338),
)
FOUND = TaskAccuracy(lm_eval="0.4.13", checkpoint_sha256="0", recipe_sha256=None, tasks=(ROW,))


def write(run: Path, found: TaskAccuracy) -> None:
    task_place(run / "bundle").write_text(found.model_dump_json())


def test_a_row_shows_the_documents_figures() -> None:
    shown = ("piqa<b>", "acc", "1838", "67.23 %", "68.01 %", "-0.78 (-1.51 to -0.04)", "0.041", "2.56 %")
    assert task_rows(FOUND) == [shown]
    assert len(shown) == len(TASK_HEADINGS)
    assert sum(map(len, shown)) + 2 * len(shown) <= 80


@pytest.mark.parametrize(("limit", "passed"), [(0.03, False), (0.04, True)])
def test_the_limit_is_held_against_the_end_of_the_interval(limit: float, passed: bool) -> None:
    found = FOUND.model_copy(update={"max_flips": limit})
    ((kept, sentence),) = task_gates(found)
    assert found.passed is kept is passed
    assert sentence.startswith("passed" if passed else "MISSED")
    assert f"ends at 3.38 %, limit {100 * limit:.2f} %" in sentence


def test_the_page_shows_the_tasks_of_its_bundle_and_no_others(tmp_path: Path) -> None:
    with pictures_left_blank():
        run = write_run(tmp_path)
        assert "Standard tasks" not in read(run)[1].text
        write(run, FOUND.model_copy(update={"max_flips": 0.03}))
        page, seen = read(run)
        assert all(cell in seen.text for cell in task_rows(FOUND)[0])
        assert "MISSED: max-flips, piqa<b>, acc" in seen.text
        assert "<b>" not in page
        write(run, FOUND.model_copy(update={"recipe_sha256": "another"}))
        assert "another bundle answered them" in read(run)[1].text
        task_place(run / "bundle").write_text("{}")
        assert "lm_eval: Field required; run check --tasks again" in read(run)[1].text


def test_the_document_is_read_as_it_was_written(tmp_path: Path) -> None:
    write(tmp_path, FOUND)
    assert load_task_accuracy(tmp_path / "bundle.tasks.json") == FOUND
    assert json.loads((tmp_path / "bundle.tasks.json").read_text())["tasks"][0]["items"] == 1838
