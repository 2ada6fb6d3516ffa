"""`check --tasks`: figures of both models, the JSON file, the limit, and bad input."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spike_export.artifacts.manifest import load_manifest
from spike_export.artifacts.results.task_document import load_task_accuracy, task_place
from spike_export.checkpoint.modules import linears
from spike_export.checkpoint.opening import open_checkpoint
from spike_export.engines.engine import Engine
from spike_export.engines.generation.bundle_tokenizer import BundleTokenizer
from spike_export.engines.onnx_runtime.session import open_bundle
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.pipeline.checking import tasks as pipeline_tasks
from tests.pipeline.test_no_network import watched
from tests.support.documentation import json_keys
from tests.support.terminal_words import kept_words, too_wide
from tests.support.tiny.cli_models import call, write_model
from tests.support.tiny.models import tiny_recipe, unquantized_recipe

harness_needed = pytest.mark.skipif(
    pipeline_tasks.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'spike-export[lm-eval]'"
)

pytestmark = pytest.mark.usefixtures("one_thread")

PREFIX = (0, 40)
WRITES: dict[str, Any] = {
    "output_type": "generate_until",
    "doc_to_choice": None,
    "doc_to_target": "{{question}}",
    "generation_kwargs": {"until": ["u", "\0"], "do_sample": False, "max_gen_toks": 2},
    "metric_list": [{"metric": "exact_match"}],
}
"""Fields of a task whose answers are texts."""
WORDS = ("abc", "bed", "cad", "dab", "ebb", "ace", "fed", "bad", "fab", "cab")
ITEMS = [
    {"question": f"{a} {b}", "choices": [a, a[::-1], b], "label": index % 3}
    for index, (a, b) in enumerate((a, b) for a in WORDS[:6] for b in WORDS[6:])
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `model`, and `bundle` with a prefix that holds BOS and scales so coarse that answers flip."""
    folder = tmp_path_factory.mktemp("tasks")
    write_model(folder / "model")
    checkpoint = open_checkpoint(str(folder / "model"))
    recipe = tiny_recipe(checkpoint, dict.fromkeys(linears(checkpoint.config), 1.0), prefix=PREFIX)
    export_bundle(checkpoint, recipe, ExportOptions("float32"), folder / "bundle")
    return folder


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra `corpora` is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def task_file(folder: Path, items: list[dict[str, Any]] = ITEMS, name: str = "words", **fields: Any) -> Path:
    """Write items and a task over them; `fields` replace those of the task, None removes one."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": metric, "aggregation": "mean"} for metric in ("acc", "acc_norm")],
        **fields,
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}), encoding="utf-8")
    return path


def arguments(folder: Path, tasks: Path | str) -> tuple[Path | str, ...]:
    return ("check", folder / "bundle", "--reference", folder / "model", "--tasks", str(tasks))


def right_answers(bundle: Path) -> list[bool]:
    """Answer the items by the bundle's logits, one choice a call, without the harness."""
    session, tokenizer = open_bundle(bundle, 1), BundleTokenizer.read(bundle)
    found = []
    for item in ITEMS:
        scores = []
        for choice in item["choices"]:
            context, whole = (
                tokenizer.encode(text, add_special_tokens=False)
                for text in (f"{item['question']}:", f"{item['question']}: {choice}")
            )
            logits = session.prefill(np.array([whole]))[0].astype(np.float64)
            rows = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            scores.append(sum(rows[place - 1, whole[place]] for place in range(len(context), len(whole))))
        found.append(int(np.argmax(scores)) == item["label"])
    return found


@harness_needed
def test_the_answers_are_those_of_both_models_and_the_file_says_so(folder: Path, tmp_path: Path) -> None:
    with watched() as sockets:
        done = call(*arguments(folder, task_file(tmp_path)))
    assert (done.code, done.err) == (0, "")
    # A library that the harness imports tries whether there is IPv6 by binding to this machine's own address.
    assert [each for each in sockets if not each.startswith("socket.bind ('::1', 0)")] == []
    found = load_task_accuracy(task_place(folder / "bundle"))
    document = json.loads(task_place(folder / "bundle").read_text())
    assert document["passed"] is True
    assert found.recipe_sha256 == load_manifest(folder / "bundle").model.recipe_sha256
    accuracy, normed = found.tasks
    assert (accuracy.task, accuracy.metric, normed.metric, accuracy.items) == ("words", "acc", "acc_norm", len(ITEMS))
    checkpoint = open_checkpoint(str(folder / "model"))
    recipe = unquantized_recipe(checkpoint, PREFIX)
    export_bundle(checkpoint, recipe, ExportOptions("float32"), tmp_path / "unquantized")
    ours, theirs = (np.array(right_answers(place)) for place in (folder / "bundle", tmp_path / "unquantized"))
    assert (accuracy.accuracy, accuracy.reference_accuracy) == (ours.mean(), theirs.mean())
    assert accuracy.lost == tuple(np.flatnonzero(theirs & ~ours))
    assert accuracy.gained == tuple(np.flatnonzero(ours & ~theirs))
    assert accuracy.lost, "scales of this size turn answers"
    assert accuracy.gained
    assert f"  words  acc       {len(ITEMS)} " in done.out


@harness_needed
def test_texts_are_those_that_both_models_write(folder: Path, tmp_path: Path) -> None:
    """The right answers are what the unquantized model writes: it has all of them right, and the bundle its own."""
    checkpoint = open_checkpoint(str(folder / "model"))
    recipe, texts = unquantized_recipe(checkpoint, PREFIX), []
    export_bundle(checkpoint, recipe, ExportOptions("float32"), tmp_path / "unquantized")
    for bundle in (folder / "bundle", tmp_path / "unquantized"):
        with Engine.open(bundle) as engine:
            found = (engine.generate(f"{item['question']}:", do_sample=False, max_new_tokens=2) for item in ITEMS)
            texts.append([re.split("[u\0]", each.text)[0] for (each,) in found])
    ours, theirs = texts
    items = [{**item, "answer": text} for item, text in zip(ITEMS, theirs, strict=True)]
    path = task_file(tmp_path, items, **WRITES | {"doc_to_target": "{{answer}}"})
    done = call(*arguments(folder, path), "--out", tmp_path / "found.json")
    assert (done.code, done.err) == (0, "")
    (row,) = load_task_accuracy(tmp_path / "found.json").tasks
    kept = [mine == text for mine, text in zip(ours, theirs, strict=True)]
    assert (row.metric, row.items, row.reference_accuracy) == ("exact_match", len(ITEMS), 1)
    assert row.lost == tuple(index for index, same in enumerate(kept) if not same)
    assert any(kept), "scales of this size turn some texts, not all"
    assert row.lost


@harness_needed
def test_the_limit_is_held_against_the_end_of_the_interval(folder: Path, tmp_path: Path) -> None:
    whole = (*arguments(folder, task_file(tmp_path)), "--items", "8", "--out", tmp_path / "found.json")
    with pytest.MonkeyPatch.context() as patch:
        words = kept_words(patch)
        assert sorted(json.loads(call(*whole, "--json").out)) == sorted(json_keys()["check --tasks"])
    assert "McNemar" in " ".join(words)
    assert too_wide(words) == []
    done = call(*whole, "--max-flips", "0.2")
    rows = load_task_accuracy(tmp_path / "found.json").tasks
    assert rows[0].items == 8
    assert (done.code == 1) is (max(row.flips_interval[1] for row in rows) > 0.2) is True
    assert "MISSED: max-flips, words, acc: the 95 % interval ends at " in done.out
    assert call(*whole, "--max-flips", "1").code == 0


@harness_needed
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"doc_to_txt": "{{question}}"}, "has a field 'doc_to_txt', which lm-evaluation-harness does not know"),
        ({"doc_to_target": "answer"}, "item 0 of words has the label 'answer', which names none of its 3 choices"),
        ({"doc_to_target": "{{answer}}"}, "'answer' is undefined"),
        (
            {"output_type": "loglikelihood_rolling"},
            "is of the kind loglikelihood_rolling; --tasks judges multiple_choice,",
        ),
        (WRITES | {"doc_to_target": "answer"}, "item 0 of words has the target 'answer', which is no answer"),
        (WRITES | {"generation_kwargs": {"until": [], "temperature": 0.7}}, "words draws its texts at random"),
        (WRITES | {"generation_kwargs": {"until": [], "num_beams": 2}}, "has num_beams, which no text here obeys"),
        (WRITES | {"generation_kwargs": {"until": [], "max_gen_toks": 300}}, "and a sequence has room for 2"),
        ({"output_type": "essay"}, "Got invalid output_type 'essay'"),
        ({"test_split": "exam"}, "exam"),
        ({"dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}}, "the task's data cannot be read"),
        ({"dataset_path": None}, "cannot load the task"),
        ({"task": None}, "cannot load the task"),
        ({"doc_to_text": "{{question}}" * 40}, "and a sequence has room for"),
        ({"doc_to_text": "{{question}}{{'' + 1 if label == 2}}"}, "lm-evaluation-harness cannot judge the tasks"),
        ({"metric_list": [{"metric": "brier_score"}]}, "has no metric that is 0 or 1 for every item"),
    ],
)
def test_a_task_that_cannot_be_judged_is_one_line(
    folder: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    path = task_file(tmp_path, **fields)
    error = call(*arguments(folder, path), "--out", tmp_path / "found.json").error
    assert message in error
    assert not (tmp_path / "found.json").exists()


@harness_needed
def test_items_without_a_right_answer_are_refused(folder: Path, tmp_path: Path) -> None:
    """The harness would count them as wrong answers of both models."""
    for label in (3, -1, "x"):
        path = task_file(
            tmp_path, [ITEMS[0], {**ITEMS[1], "label": label}] if label != "x" else [{**ITEMS[0], "label": label}]
        )
        assert "which names none of its 3 choices; correct the labels" in call(*arguments(folder, path)).error
    unlabelled = [{key: value for key, value in item.items() if key != "label"} for item in ITEMS]
    assert "the label 'label', which names none" in call(*arguments(folder, task_file(tmp_path, unlabelled))).error
    assert "none.yaml: no such file" in call(*arguments(folder, "none.yaml")).error
    (tmp_path / "broken.yaml").write_text("task: [", encoding="utf-8")
    assert "broken.yaml: lm-evaluation-harness cannot load" in call(*arguments(folder, tmp_path / "broken.yaml")).error
    path = task_file(tmp_path)
    assert "gives the task words twice" in call(*arguments(folder, f"{path},{path}")).error


@harness_needed
def test_other_models_and_other_tokenizers_are_refused(folder: Path, tmp_path: Path) -> None:
    path = task_file(tmp_path)
    write_model(tmp_path / "other", seed=1)
    foreign = ("check", folder / "bundle", "--reference", tmp_path / "other", "--tasks", str(path))
    assert "has other weights" in call(*foreign).error
    shutil.copytree(folder / "bundle", tmp_path / "bundle")
    document = json.loads((tmp_path / "bundle" / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "bundle" / "tokenizer.json").write_text(json.dumps(document))
    whole = ("check", tmp_path / "bundle", "--reference", folder / "model", "--tasks", str(path))
    assert "gives other tokens than the tokenizer of " in call(*whole).error


def test_options_that_do_not_fit_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = arguments(folder, "words.yaml")
    assert "--items is 0" in call(*whole, "--items", "0").error
    assert "--max-flips is 2" in call(*whole, "--max-flips", "2").error
    assert "names no task" in call(*arguments(folder, " ,")).error
    assert "either --lint or --tasks" in call("check", folder / "bundle", "--lint", "--tasks", "words.yaml").error
    assert "omit them" in call("check", folder / "bundle", "--reference", folder / "model", "--items", "3").error
    assert "needs --reference MODEL" in call("check", folder / "bundle", "--tasks", "words.yaml").error
    monkeypatch.setattr(pipeline_tasks, "find_spec", lambda name: None)
    assert "pip install 'spike-export[lm-eval]'" in call(*whole).error
