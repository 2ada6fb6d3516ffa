"""Rows of text in progress: why each ends, what of its last tokens is told, how probable its tokens were."""

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from spike_export.artifacts.errors import EngineError
from spike_export.engines.generation.decoding import DecodedStep, require_finite
from spike_export.engines.generation.generated_text import Generation, Piece, Row, TokenLogprob, joined, streamed
from spike_export.engines.generation.options import GenerationOptions
from tests.support.tiny.checkpoints import byte_tokenizer

TOKENIZER: Any = SimpleNamespace(backend_tokenizer=byte_tokenizer())
EOS = 1


def bytes_of(text: str) -> list[int]:
    return [2 + byte for byte in text.encode()]


def steps_of(*rows: Sequence[int]) -> list[DecodedStep]:
    return [DecodedStep(np.array(tokens)) for tokens in zip(*rows, strict=True)]


def rows_of(count: int = 1, **options: Any) -> list[Row]:
    chosen = GenerationOptions(eos_token_ids=(EOS,), **options)
    return [Row(TOKENIZER, row, np.array(bytes_of("a")), chosen) for row in range(count)]


@pytest.mark.parametrize(
    ("tokens", "options", "text", "reason", "count"),
    [
        ([*bytes_of("bc"), EOS, *bytes_of("d")], {}, "bc", "stop", 3),
        ([EOS], {}, "", "stop", 1),
        ([*bytes_of("bc"), EOS, *bytes_of("d")], {"ignore_eos": True, "max_new_tokens": 4}, "bcd", "length", 4),
        (bytes_of("bcde"), {"max_new_tokens": 2}, "bc", "length", 2),
        (bytes_of("bcde"), {"stop_strings": ("cd",)}, "b", "stop", 3),
        # The beginning of a stop string is told when the row ends without the rest of it.
        (bytes_of("bcde"), {"stop_strings": ("cx",), "max_new_tokens": 2}, "bc", "length", 2),
        ([*bytes_of("bc"), EOS], {"stop_strings": ("cx",)}, "bc", "stop", 3),
        # Half of a character is told as what it is, and may complete a stop string.
        ([*bytes_of("b"), 2 + 0xC3, EOS], {}, "b\N{REPLACEMENT CHARACTER}", "stop", 3),
        (
            [*bytes_of("b"), 2 + 0xC3],
            {"stop_strings": ("\N{REPLACEMENT CHARACTER}",), "max_new_tokens": 2},
            "b",
            "stop",
            2,
        ),
    ],
)
def test_how_a_row_ends(tokens: list[int], options: dict[str, Any], text: str, reason: str, count: int) -> None:
    pieces = list(streamed(iter(steps_of(tokens)), rows_of(**options)))
    found = joined(pieces, 7)
    assert found == Generation(text, tuple(tokens[:count]), reason, 7)  # type: ignore[arg-type]
    assert [piece.finish_reason for piece in pieces] == [None] * (count - 1) + [reason]


def test_rows_end_each_for_itself_and_then_the_steps_are_closed() -> None:
    closed = []

    def steps() -> Iterator[DecodedStep]:
        try:
            yield from steps_of([*bytes_of("b"), EOS, *bytes_of("xxxx")], [*bytes_of("cde"), EOS, *bytes_of("xx")])
        finally:
            closed.append(True)

    rows = rows_of(2)
    pieces = list(streamed(steps(), rows))
    assert [(piece.row, piece.text) for piece in pieces] == [(0, "b"), (1, "c"), (0, ""), (1, "d"), (1, "e"), (1, "")]
    assert closed == [True]
    assert all(row.ended for row in rows)
    stopped = streamed(steps(), rows_of(2))
    assert next(stopped) == Piece(0, *bytes_of("b"), "b")
    stopped.close()  # type: ignore[attr-defined]
    assert closed == [True, True]


def test_tokens_come_with_their_logprobs() -> None:
    tokens, top = np.array(bytes_of("bc")), np.array([bytes_of("bx"), bytes_of("yc")])
    step = DecodedStep(tokens, np.array([-0.5, -1.5]), top, np.array([[-0.5, -2.0], [-1.0, -1.5]]))
    rows = rows_of(2, max_new_tokens=1)
    (first, second) = streamed(iter([step]), rows)
    b, c, x, y = bytes_of("bcxy")
    assert first.logprob == TokenLogprob(b, -0.5, ((b, -0.5), (x, -2.0)))
    assert second.logprob == TokenLogprob(c, -1.5, ((y, -1.0), (c, -1.5)))
    assert joined([second], 1).logprobs == (second.logprob,)
    alone = DecodedStep(tokens, np.array([-0.5, -1.5]))
    assert next(streamed(iter([alone]), rows_of(max_new_tokens=1))).logprob == TokenLogprob(b, -0.5)


def test_the_first_row_that_is_not_finite_is_named() -> None:
    require_finite(np.array([True, True]), "do this")
    with pytest.raises(EngineError, match=r"^row 1: the logits are not finite, an activation overflowed; do this$"):
        require_finite(np.array([True, False, False]), "do this")
