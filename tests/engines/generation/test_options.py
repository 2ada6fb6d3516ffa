"""Where the ranges of generation's options end, which types they take, and what holds by default."""

from typing import Any

import pytest

from spike_export.artifacts.errors import EngineError
from spike_export.engines.generation.options import LOWEST_TEMPERATURE, GenerationOptions, require_vocabulary

NAN, INFINITE = float("nan"), float("inf")

RANGES: dict[str, tuple[list[Any], list[Any]]] = {
    "max_new_tokens": ([1, 10**6], [0, True, 1.0, None]),
    "do_sample": ([True, False], [0, 1, None, "true"]),
    "temperature": ([LOWEST_TEMPERATURE, 1, 9.0], [LOWEST_TEMPERATURE / 2, -1.0, NAN, True, "1", None]),
    "top_k": ([0, 1], [-1, 1.0, False]),
    "top_p": ([1e-6, 0.5, 1, 1.0], [0.0, 1.001, NAN, True]),
    "min_p": ([0, 0.0, 1.0], [-0.001, 1.001, NAN, "0"]),
    "repetition_penalty": ([1e-6, 2], [0.0, -1.0, NAN, None]),
    "presence_penalty": ([-2.0, 0, 2.0], [NAN, INFINITE, None, True]),
    "frequency_penalty": ([-2.0, 0, 2.0], [NAN, INFINITE, None, True]),
    "logit_bias": (
        [(), ((0, 1.0), (5, -1)), ((0, -INFINITE),)],
        [[(0, 1.0)], ((-1, 1.0),), ((0.0, 1.0),), ((0, NAN),), ((0, INFINITE),), ((0, "1"),), None],
    ),
    "seed": ([None, 0, 2**62 - 1], [-1, 2**62, 0.0, True]),
    "logprobs": ([None, 0, 5], [-1, 1.0, False]),
    "stop_strings": ([(), ("a", "bc")], [("a", "")]),
    "ignore_eos": ([True, False], [0, None]),
    "logprobs_as_drawn": ([True, False], [1, None]),
}
"""Option → values that it takes, up to the ends of its range; values outside, and of other types."""


@pytest.mark.parametrize("name", RANGES)
def test_where_an_options_range_ends(name: str) -> None:
    inside, outside = RANGES[name]
    for value in inside:
        assert getattr(GenerationOptions(**{name: value}), name) == value
    for value in outside:
        with pytest.raises(EngineError, match=f"^{name} is .*; expected "):
            GenerationOptions(**{name: value})


def test_a_single_stop_string_is_one() -> None:
    assert GenerationOptions(stop_strings="ab").stop_strings == ("ab",)  # type: ignore[arg-type]


def test_the_defaults_change_nothing() -> None:
    assert GenerationOptions() == GenerationOptions(
        max_new_tokens=128,
        do_sample=False,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        repetition_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        logit_bias=(),
        seed=None,
        stop_strings=(),
        eos_token_ids=(),
        ignore_eos=False,
        logprobs=None,
        logprobs_as_drawn=False,
    )


def test_a_bias_is_of_a_token_that_the_model_knows() -> None:
    options = GenerationOptions(logit_bias=((3, 1.0), (9, 1.0)))
    require_vocabulary(options, 10)
    with pytest.raises(EngineError, match=r"^logit_bias names the token 9; the model knows 0 to 8$"):
        require_vocabulary(options, 9)
