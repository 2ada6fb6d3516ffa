"""lm-evaluation-harness through the server: a task has the figures that the bundle's own session gives."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spike_export.engines.engine import Engine
from spike_export.engines.onnx_runtime.session import open_bundle
from tests.support.tiny.service import Running

model_api: Any = pytest.importorskip("lm_eval.api.model", reason="lm-eval is not installed")
task_api: Any = pytest.importorskip("lm_eval.api.task", reason="lm-eval is not installed")
evaluator: Any = pytest.importorskip("lm_eval.evaluator", reason="lm-eval is not installed")
clients: Any = pytest.importorskip("lm_eval.models.openai_completions", reason="lm-eval is not installed")
pytest.importorskip("tenacity", reason="lm-eval's client of servers is not installed")

QUESTIONS = [
    {"question": "One and one is", "choices": [" two", " three", " 4"], "answer": 0},
    {"question": "The sky is", "choices": [" green", " blue"], "answer": 1},
    {"question": "A", "choices": ["b", "c", "d"], "answer": 2},
]


class OwnSession(model_api.TemplateLM):  # type: ignore[misc]
    """Scores tokens with the bundle's logits, in this process."""

    def __init__(self, bundle: Path) -> None:
        super().__init__()
        self._session, self._tokenizer = open_bundle(bundle, threads=1), Engine.open(bundle, threads=1).tokenizer

    eot_token_id = 1

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        tokens: list[int] = self._tokenizer.encode(string, add_special_tokens=False)
        return tokens

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        return [self._score(context, continuation) for _, context, continuation in requests]

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        tokens = np.array([[*context, *continuation]])
        logits = torch.from_numpy(self._session.begin(1).step(tokens)[0, len(context) - 1 : -1])
        logprobs, targets = logits.log_softmax(-1), torch.tensor(continuation)
        return float(logprobs.gather(1, targets[:, None]).sum()), bool((logits.argmax(-1) == targets).all())

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        raise NotImplementedError

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        raise NotImplementedError


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
    expected, scores = figures(OwnSession(bundle), data)
    found, remote_scores = figures(remote, data)
    assert found == expected
    assert [len(each) for each in remote_scores] == [3, 2, 3]
    for own, told in zip(scores, remote_scores, strict=True):
        assert told == pytest.approx(own, abs=2e-4)  # a dozen tokens, each of them read in calls of other lengths
