"""Text of tokens as they come: whole characters, the spaces of the whole text, stop strings wherever they are cut."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from spike_export.engines.generation.stop_strings import StopStrings
from spike_export.engines.generation.token_stream import TokenStream
from tests.support.tiny.checkpoints import byte_tokenizer

PIECES = ("\u2581", "\u2581Hello", "\u2581a", "world", ",", "\u00e9")


def sentencepiece_tokenizer() -> Tokenizer:
    """As of LLaMA 2: a blank in front of the text is dropped, and rare characters are tokens of bytes."""
    special = ("<unk>", "<s>", "</s>")
    names = (*special, *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES)
    tokenizer = Tokenizer(
        models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[], byte_fallback=True)
    )
    tokenizer.add_special_tokens(list(special))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


BYTE_LEVEL, SENTENCEPIECE = byte_tokenizer(), sentencepiece_tokenizer()

WORDS = st.lists(st.sampled_from([3 + 256 + index for index in range(len(PIECES))]).map(lambda token: [token]))
LETTERS = st.text(max_size=6).map(lambda text: [3 + byte for byte in text.encode()])
MIXED = st.lists(st.one_of(WORDS, LETTERS.map(lambda tokens: [tokens]), st.just([[2]])), max_size=8).map(
    lambda parts: [token for part in parts for tokens in part for token in tokens]
)


def pieces_of(tokenizer: Tokenizer, tokens: Sequence[int], prompt: Sequence[int] = ()) -> list[str]:
    stream = TokenStream(tokenizer, prompt)
    return [*(stream.feed(token) for token in tokens), stream.finish()]


@settings(deadline=None)
@given(text=st.text(max_size=30), prompt=st.text(max_size=12))
def test_every_byte_a_token_and_no_piece_within_a_character(text: str, prompt: str) -> None:
    tokens = [2 + byte for byte in text.encode()]
    pieces = pieces_of(BYTE_LEVEL, tokens, [2 + byte for byte in prompt.encode()])
    assert "".join(pieces) == text
    assert "\N{REPLACEMENT CHARACTER}" in text or not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@settings(deadline=None)
@given(tokens=st.lists(st.integers(0, 257), max_size=30), prompt=st.text(max_size=12))
def test_bytes_that_are_no_text_end_as_the_tokenizer_decodes_them(tokens: list[int], prompt: str) -> None:
    before = [2 + byte for byte in prompt.encode()]
    assert prompt + "".join(pieces_of(BYTE_LEVEL, tokens, before)) == BYTE_LEVEL.decode(before + tokens)


@settings(deadline=None, max_examples=300)
@given(tokens=MIXED)
def test_blanks_are_those_of_prompt_and_answer_together(tokens: list[int]) -> None:
    prompt = [1, 260, 262]
    whole = SENTENCEPIECE.decode(prompt + tokens)
    assert SENTENCEPIECE.decode(prompt) + "".join(pieces_of(SENTENCEPIECE, tokens, prompt)) == whole


def test_a_word_behind_a_prompt_keeps_its_blank() -> None:
    hello = 3 + 256 + 1
    assert pieces_of(SENTENCEPIECE, [hello, hello], [1, hello]) == [" Hello", " Hello", ""]
    # Alone, a text begins without one: what decoding token by token would do to every word.
    assert pieces_of(SENTENCEPIECE, [hello, hello]) == ["Hello", " Hello", ""]


def test_a_character_comes_with_its_last_byte() -> None:
    tokens = [2 + byte for byte in "a\u20ac\U0001f600".encode()]
    assert pieces_of(BYTE_LEVEL, tokens) == ["a", "", "", "\u20ac", "", "", "", "\U0001f600", ""]
    assert pieces_of(BYTE_LEVEL, tokens[:-1])[-1] == "\N{REPLACEMENT CHARACTER}"


def test_special_tokens_have_no_text_unless_asked_for() -> None:
    assert pieces_of(BYTE_LEVEL, [1, 2 + ord("a")]) == ["", "a", ""]
    stream = TokenStream(BYTE_LEVEL, skip_special_tokens=False)
    assert stream.feed(1) == "</s>"


def passed(strings: tuple[str, ...], pieces: Sequence[str]) -> tuple[str, bool]:
    stops = StopStrings(strings)
    text = "".join(stops.feed(piece) for piece in pieces)
    return text + stops.finish(), stops.found


def first_stop(strings: tuple[str, ...], text: str) -> tuple[str, bool]:
    """By definition: the shortest beginning of the text that ends with a stop string, without the longest such."""
    for end in range(1, len(text) + 1):
        found = [string for string in strings if text[:end].endswith(string)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@settings(max_examples=400)
@given(
    strings=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3).map(tuple),
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
)
def test_text_is_cut_before_the_first_stop_string_however_it_comes(strings: tuple[str, ...], pieces: list[str]) -> None:
    text = "".join(pieces)
    expected = first_stop(strings, text)
    for cut in (pieces, [text], list(text)):
        assert passed(strings, cut) == expected


@pytest.mark.parametrize(
    ("pieces", "told"),
    [
        (["one", "\n", "two"], ["one", "", "\ntwo"]),
        (["x", "\n", "\n", "y"], ["x", "", "", ""]),
    ],
)
def test_only_what_may_become_a_stop_string_is_held_back(pieces: list[str], told: list[str]) -> None:
    stops = StopStrings(("\n\n",))
    assert [stops.feed(piece) for piece in pieces] == told
