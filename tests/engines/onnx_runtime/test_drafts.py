"""Drafted tokens are those that are drawn without drafts, wherever the drafts are wrong and wherever the room ends."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spike_export.artifacts.errors import EngineError
from spike_export.engines.generation.draft_length import DraftLength
from spike_export.engines.generation.options import GenerationOptions
from spike_export.engines.onnx_runtime.decoding import OnnxDecoding
from spike_export.engines.onnx_runtime.session import open_for_generation
from spike_export.engines.runtime_choice import open_onnx
from spike_export.export.bundle import ExportOptions, LogitsScope, export_bundle
from spike_export.export.cache_options import CacheOptions
from tests.support.tiny.models import tiny_llama, unquantized_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

CAPACITY = 48


class AlwaysDrafts(DraftLength):
    """Drafts as much as it may, whatever that costs."""

    def choose(self) -> int:
        return 5


@pytest.fixture(scope="module", params=["all", "last"])
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OnnxDecoding:
    scope: LogitsScope = request.param
    model, bundle = tiny_llama(max_positions=CAPACITY), tmp_path_factory.mktemp("drafts") / "bundle"
    options = ExportOptions("float32", cache=CacheOptions("static", CAPACITY), logits=scope)
    export_bundle(model.checkpoint, unquantized_recipe(model.checkpoint, (5, 1, 9)), options, bundle)
    return OnnxDecoding(open_for_generation(bundle, threads=1))


def drawn(decoding: OnnxDecoding, prompt: list[int], options: GenerationOptions) -> list[tuple[int, float, list[int]]]:
    steps = list(decoding.decode([np.array(prompt)], options))
    return [(int(step.tokens[0]), float(step.logprobs[0]), step.top_tokens[0].tolist()) for step in steps]  # type: ignore[index]


@settings(max_examples=25, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 4), min_size=1, max_size=30),
    count=st.integers(1, 49),
    sampled=st.booleans(),
    penalty=st.sampled_from([1.0, 1.3]),
    seed=st.integers(0, 99),
)
def test_the_tokens_are_those_without_drafts(
    plain: OnnxDecoding, prompt: list[int], count: int, sampled: bool, penalty: float, seed: int
) -> None:
    options = GenerationOptions(
        max_new_tokens=min(count, CAPACITY + 1 - len(prompt)),
        do_sample=sampled,
        seed=seed,
        top_k=3,
        repetition_penalty=penalty,
        presence_penalty=0.1,
        logprobs=2,
    )
    expected = drawn(plain, prompt, options)
    found = drawn(replace(plain, drafts=AlwaysDrafts()), prompt, options)
    assert [each[0] for each in found] == [each[0] for each in expected]
    assert [each[2] for each in found] == [each[2] for each in expected]
    np.testing.assert_allclose([each[1] for each in found], [each[1] for each in expected], atol=1e-4)


def test_drafts_that_are_right_save_calls(plain: OnnxDecoding, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias lets the model say one token again and again."""
    drafts, calls = AlwaysDrafts(), []
    monkeypatch.setattr(
        "spike_export.engines.onnx_runtime.sequences.run_bound",
        lambda session, binding, sequence: (calls.append(sequence), session.run_with_iobinding(binding)),
    )
    options = GenerationOptions(max_new_tokens=40, logit_bias=((7, 100.0),))
    list(replace(plain, drafts=drafts).decode([np.array([3, 4])], options))
    assert drafts.accepted > 25
    assert len(calls) == 40 - drafts.accepted
    assert sum(calls) == 2 + len(calls) - 1 + drafts.drafted


def test_a_batch_is_not_drafted(plain: OnnxDecoding) -> None:
    drafts = AlwaysDrafts()
    steps = replace(plain, drafts=drafts).decode(
        [np.array([1, 2]), np.array([1, 2])], GenerationOptions(max_new_tokens=8)
    )
    assert len(list(steps)) == 8
    assert drafts.drafted == 0


def test_drafts_need_a_static_cache(tmp_path: Path) -> None:
    export_bundle(tiny_llama().checkpoint, None, ExportOptions("float32"), tmp_path / "bundle")
    with pytest.raises(EngineError, match="drafts are verified over a static cache; export with --kv-cache static"):
        open_onnx(tmp_path / "bundle", 1, "cpu", speculate="ngram")
    with pytest.raises(EngineError, match="speculate is 'often'; expected off or ngram"):
        open_onnx(tmp_path / "bundle", 1, "cpu", speculate="often")  # type: ignore[arg-type]
