"""lm-evaluation-harness through the server: a task has the figures that `check --tasks` gives in process."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from spike_export.artifacts.manifest import load_manifest
from spike_export.engines.generation.bundle_tokenizer import BundleTokenizer
from spike_export.engines.onnx_runtime.session import open_bundle
from spike_export.engines.tasks.continuation_scores import bundle_model
from tests.support.tiny.service import Running

task_api: Any = pytest.importorskip("lm_eval.api.task", reason="lm-eval is not installed")
evaluator: Any = pytest.importorskip("lm_eval.evaluator", reason="lm-eval is not installed")
clients: Any = pytest.importorskip("lm_eval.models.openai_completions", reason="lm-eval is not installed")
pytest.importorskip("tenacity", reason="lm-eval's client of servers is not installed")
harness_model: Any = pytest.importorskip("spike_export.engines.tasks.harness_model", reason="lm-eval is not installed")

QUESTIONS = [
    {"question": "One and one is", "choices": [" two", " three", " 4"], "answer": 0},
    {"question": "The sky is", "choices": [" green", " blue"], "answer": 1},
    {"question": "A", "choices": ["b", "c", "d"], "answer": 2},
]


def in_process(bundle: Path) -> Any:
    """Return the bundle as `check --tasks` asks it."""
    tokenizer = BundleTokenizer.read(bundle)
    model = bundle_model(open_bundle(bundle, threads=1, all_logits=True))
    return harness_model.HarnessModel(
        model, lambda text: tokenizer.encode(text, add_special_tokens=False), load_manifest(bundle)
    )


def figures(model: Any, data: Path) -> tuple[dict[str, Any], list[list[float]]]:
    """Return a task's results, and each choice's log-likelihood."""
    task = task_api.ConfigurableTask(
        config={
            "task": "own",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
    )
    found = evaluator.evaluate(lm=model, task_dict={"own": task}, bootstrap_iters=0, log_samples=True)
    assert found is not None
    scores = [[score for score, _ in sample["filtered_resps"]] for sample in found["samples"]["own"]]
    return {name: value for name, value in found["results"]["own"].items() if name.startswith("acc")}, scores


def test_a_task_scores_through_the_server_as_in_process(
    server: Running, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS), encoding="utf-8")
    remote = clients.LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions",
        model="tiny",
        tokenizer=str(bundle),
        tokenizer_backend="huggingface",
        batch_size=2,
    )
    expected, scores = figures(in_process(bundle), data)
    found, remote_scores = figures(remote, data)
    assert found == expected
    assert [len(each) for each in remote_scores] == [3, 2, 3]
    for own, told in zip(scores, remote_scores, strict=True):
        assert told == pytest.approx(own, abs=2e-4)  # a dozen tokens, each of them read in calls of other lengths
