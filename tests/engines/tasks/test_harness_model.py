"""What a model is fed of the harness's requests: BOS once, and no request that cannot be scored."""

from typing import Any

import pytest

from spike_export.artifacts.errors import EngineError
from spike_export.artifacts.manifest import BundlePrefix
from tests.support.tiny.bundles import TinyModel, tiny_manifest

harness_model: Any = pytest.importorskip("spike_export.engines.tasks.harness_model", reason="lm-eval is not installed")

BOS = 1


def manifest(bos: int | None, prefix: tuple[int, ...]) -> Any:
    held = BundlePrefix(token_ids=prefix, text="", length=len(prefix), holds_bos=bos in prefix) if prefix else None
    return tiny_manifest(TinyModel()).model_copy(
        update={"bos_token_id": bos, "prefix": held, "max_position_embeddings": 8}
    )


@pytest.mark.parametrize(
    ("bos", "prefix", "context", "fed"),
    [
        (BOS, (), (5, 6), (BOS, 5, 6)),
        (BOS, (), (BOS, 5), (BOS, 5)),
        (BOS, (7,), (5,), (BOS, 5)),
        (BOS, (BOS, 7), (5, 6), (5, 6)),
        (BOS, (BOS, 7), (BOS, 5), (5,)),
        (BOS, (BOS, 7), (BOS,), (BOS,)),
        (None, (), (5,), (5,)),
    ],
    ids=["put", "spelled", "not in the prefix", "in the prefix", "twice", "nothing else to stand behind", "none"],
)
def test_bos_is_fed_once(
    bos: int | None, prefix: tuple[int, ...], context: tuple[int, ...], fed: tuple[int, ...]
) -> None:
    model = harness_model.HarnessModel(None, None, None, manifest(bos, prefix))
    assert model._request(("a", "b"), list(context), [9]).context == fed


def test_a_text_is_written_behind_bos_up_to_the_first_string_of_some() -> None:
    model = harness_model.HarnessModel(None, None, lambda text: list(map(int, text)), manifest(BOS, ()))
    asked = model._text_request("56", {"until": "\n", "max_gen_toks": 3, "do_sample": False})
    assert (asked.context, asked.stops, asked.tokens) == ((BOS, 5, 6), ("\n",), 3)
    asked = model._text_request("", {"until": ["", "a", "b"], "max_new_tokens": 8})
    assert (asked.context, asked.stops, asked.tokens) == ((BOS,), ("a", "b"), 8)
    with pytest.raises(EngineError, match="9 tokens, and a sequence has room for 8: it begins with '56'"):
        model._text_request("56", {"max_gen_toks": 7})
    with pytest.raises(EngineError, match="258 tokens, and a sequence has room for 8"):
        model._text_request("56", {"until": []})


def test_what_cannot_be_scored_is_refused() -> None:
    model = harness_model.HarnessModel(None, None, None, manifest(BOS, (BOS,)))
    with pytest.raises(EngineError, match="answer without tokens behind 'a'"):
        model._request(("a", "b"), [5], [])
    assert len(model._request(("a", "b"), [5] * 4, [6] * 5).fed) == 8
    with pytest.raises(EngineError, match="9 tokens, and a sequence has room for 8"):
        model._request(("a", "b"), [5] * 5, [6] * 5)
