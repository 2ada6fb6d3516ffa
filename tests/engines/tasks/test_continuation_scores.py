"""Likelihoods of continuations are those of transformers, whatever shares a row or a batch, and behind any prefix."""

from pathlib import Path

import numpy as np
import pytest
import torch

from spike_export.artifacts.errors import EngineError
from spike_export.calibration.decoder.layerwise import Decoder, Execution
from spike_export.engines.onnx_runtime.session import open_bundle
from spike_export.engines.tasks.continuation_scores import (
    ContinuationScore,
    Model,
    bundle_model,
    decoder_model,
    score_continuations,
)
from spike_export.engines.tasks.token_rows import Request
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.cache_options import CacheOptions
from tests.support.tiny.models import TinyModel, tiny_llama, unquantized_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

PREFIX = (1, 7)
REQUESTS = [
    Request((5, 6, 7), (8,)),
    Request((5, 6, 7), (9, 10, 11)),
    Request((5, 6, 7), (9, 12)),
    Request((60,), (3, 4)),
    Request(tuple(range(20, 60)), tuple(range(61, 80))),
]


@pytest.fixture(scope="module", params=[None, 5])
def model(request: pytest.FixtureRequest) -> TinyModel:
    """Also with a sliding window."""
    return tiny_llama(sliding_window=request.param)


def expected(model: TinyModel, request: Request) -> ContinuationScore:
    """Score a request alone, by transformers, with the prefix as tokens."""
    tokens = torch.tensor([[*PREFIX, *request.context, *request.continuation]])
    with torch.inference_mode():
        logits = model.reference(tokens, use_cache=False).logits[0, len(PREFIX) + len(request.context) - 1 : -1]
    targets = torch.tensor(request.continuation)
    chosen = logits.double().log_softmax(-1).gather(1, targets[:, None])
    return ContinuationScore(float(chosen.sum()), bool((logits.argmax(-1) == targets).all()))


def require_alike(found: list[ContinuationScore], wanted: list[ContinuationScore]) -> None:
    assert [each.greedy for each in found] == [each.greedy for each in wanted]
    # Sums of up to 19 terms, each of logits that differ by some roundings of float32.
    np.testing.assert_allclose(
        [each.log_probability for each in found], [each.log_probability for each in wanted], atol=2e-4
    )


def test_both_models_score_as_transformers(model: TinyModel, tmp_path: Path) -> None:
    if model.checkpoint.config.windows != (None,):
        # transformers' own window would leave the prefix behind; the graph and the decoder keep it in sight.
        wanted = scores(decoder_model(Decoder(model.checkpoint), PREFIX), batched=False)
    else:
        wanted = [expected(model, request) for request in REQUESTS]
    require_alike(scores(decoder_model(Decoder(model.checkpoint, Execution(resident=False)), PREFIX)), wanted)
    recipe = unquantized_recipe(model.checkpoint, PREFIX)
    for index, options in enumerate(
        (ExportOptions("float32"), ExportOptions("float32", cache=CacheOptions("static", 80), logits="last"))
    ):
        export_bundle(model.checkpoint, recipe, options, tmp_path / str(index))
        require_alike(scores(bundle_model(open_bundle(tmp_path / str(index), 1, all_logits=True))), wanted)


def scores(model: Model, *, batched: bool = True) -> list[ContinuationScore]:
    if batched:
        return score_continuations(model, REQUESTS, 99)
    return [score_continuations(model, [request], 99)[0] for request in REQUESTS]


def test_another_prefix_is_noticed(model: TinyModel) -> None:
    found, other = (scores(decoder_model(Decoder(model.checkpoint), prefix)) for prefix in (PREFIX, (1, 8)))
    assert all(abs(a.log_probability - b.log_probability) > 1e-3 for a, b in zip(found, other, strict=True))


def test_a_likely_continuation_is_greedy(model: TinyModel) -> None:
    run = decoder_model(Decoder(model.checkpoint), PREFIX)
    (logits,) = run([np.array([[5, 6, 7]])])
    best = int(logits(0, slice(2, 3)).argmax())
    assert [
        each.greedy for each in score_continuations(run, [Request((5, 6, 7), (t,)) for t in (best, best - 1)], 99)
    ] == [
        True,
        False,
    ]


def test_an_overflow_is_an_error() -> None:
    with pytest.raises(EngineError, match="not finite"):
        score_continuations(
            lambda batches: iter([lambda row, part: np.full((1, 9), np.nan, np.float32)]), [REQUESTS[0]], 9
        )
