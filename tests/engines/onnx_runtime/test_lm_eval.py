"""Bundles in lm-evaluation-harness: its own ONNX Runtime backends score them as the plain session does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from spike_export.engines.onnx_runtime.session import open_bundle
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.graph_plan import PrefixHome
from tests.export.test_bundle import with_tokenizer
from tests.support.tiny.models import input_scales, tiny_llama, tiny_recipe

registry = pytest.importorskip("lm_eval.api.registry", reason="lm-eval is not installed")
instances = pytest.importorskip("lm_eval.api.instance", reason="lm-eval is not installed")

pytestmark = pytest.mark.usefixtures("denormals_as_before")

PAIRS = [("w5 w6 w7", " w8"), ("w60", " w9 w10 w11"), ("w3 w4", " w90")]


@pytest.fixture(scope="module", params=["plain", "cache", "attention"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unquantized, or in INT8 with a prefix [BOS, w7] that lives in the cache or in attention."""
    folder, model = tmp_path_factory.mktemp("bundle") / "b", tiny_llama()
    checkpoint = with_tokenizer(model.checkpoint)
    if request.param == "plain":
        export_bundle(checkpoint, None, ExportOptions("float32"), folder)
    else:
        place: PrefixHome = request.param
        recipe = tiny_recipe(checkpoint, input_scales(model, np.arange(3, 40)[None]), prefix=(1, 7))
        export_bundle(checkpoint, recipe, ExportOptions("float32", prefix_in=place), folder)
    return folder


def log_probabilities(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    exact = logits.astype(np.float64)
    return exact - np.log(np.exp(exact).sum(-1, keepdims=True))


def session_scores(bundle: Path) -> list[tuple[float, bool]]:
    """Score the pairs with our own session, fed the tokens alone: neither BOS nor padding."""
    opened, scores = open_bundle(bundle, threads=1), []
    for context, continuation in PAIRS:
        ids, tail = (np.array([int(word[1:]) for word in text.split()]) for text in (context, continuation))
        tokens = np.concatenate([ids, tail])[None]
        manifest = opened.manifest
        empty = np.zeros((1, manifest.num_key_value_heads, 0, manifest.head_dim), np.float32)
        feeds = {value.name: empty for value in opened.session.get_inputs()[2:]}
        logits = opened.session.run(["logits"], {"input_ids": tokens, "attention_mask": np.ones_like(tokens), **feeds})
        rows = log_probabilities(logits[0][0, len(ids) - 1 : -1])
        scores.append((float(rows[np.arange(len(tail)), tail].sum()), bool((rows.argmax(-1) == tail).all())))
    return scores


def harness_scores(backend: str, bundle: Path) -> list[tuple[float, bool]]:
    model: Any = registry.get_model(backend)(pretrained=str(bundle))
    requests = [instances.Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(PAIRS)]
    return [(float(score), bool(is_greedy)) for score, is_greedy in model.loglikelihood(requests, disable_tqdm=True)]


def test_the_onnxruntime_backend_scores_any_bundle(bundle: Path) -> None:
    expected, found = session_scores(bundle), harness_scores("onnxruntime", bundle)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    np.testing.assert_allclose([score for score, _ in found], [score for score, _ in expected], rtol=1e-5)


def test_the_genai_backend_scores_what_genai_can_run(bundle: Path) -> None:
    pytest.importorskip("onnxruntime_genai", reason="the extra `genai` (onnxruntime-genai) is not installed")
    if "onnxruntime-genai" in open_bundle(bundle).manifest.unsupported:
        with pytest.raises(RuntimeError, match="--prefix-in attention"):
            harness_scores("onnxruntime-genai", bundle)
        return
    expected, found = session_scores(bundle), harness_scores("onnxruntime-genai", bundle)
    np.testing.assert_allclose([score for score, _ in found], [score for score, _ in expected], rtol=1e-5)


def test_the_scores_are_of_this_model(bundle: Path) -> None:
    """Another seed's model scores the same pairs differently, by far more than the tolerance above."""
    other = bundle.parent / "other"
    export_bundle(with_tokenizer(tiny_llama(seed=1).checkpoint), None, ExportOptions("float32"), other)
    scores = np.array([[score for score, _ in harness_scores("onnxruntime", place)] for place in (bundle, other)])
    assert (np.abs(scores[0] - scores[1]) > 1e-2).all()
