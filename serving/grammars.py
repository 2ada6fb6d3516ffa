"""Texts that follow a grammar: which tokens may come next, by llguidance."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.errors import EngineError, one_line
from spike_export.engines.generation.bundle_tokenizer import BundleTokenizer

GrammarKind = Literal["json_object", "json_schema", "regex", "choice", "lark", "gbnf"]

_ANY_OBJECT = {"type": "object"}

_BLANKS: Any = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,16}"}
"""Between two parts of a JSON text: an indented line has them, and a model that writes only blanks comes to an end."""

AS_DUMPED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON with the blanks that Python's `json.dumps` and Jinja's `tojson` write: what models of calls were trained on."""


class Grammars:
    """Grammars over one tokenizer, which is prepared when the first one is asked for."""

    def __init__(self, tokenizer: BundleTokenizer, vocab: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer, self._vocab, self._eos = tokenizer, vocab, list(eos_token_ids)

    def compile(self, kind: GrammarKind, source: Any) -> "Grammar":
        """Return the beginning of a text of a grammar.

        Args:
            kind: What `source` is: a JSON schema, a regular expression, a list of texts, or a grammar in Lark's or in
                llama.cpp's notation (GBNF); nothing for any JSON object.
            source: The schema as a mapping, the texts, else one text.

        Raises:
            EngineError: It is no such grammar, or too large a one; or the model has no token that ends a text.
        """
        from llguidance import LLMatcher

        if not self._eos:
            raise EngineError("the model has no token that ends a text, which a grammar needs")
        try:
            matcher = LLMatcher(self._words, _spelled(kind, source))
        except Exception as error:  # what the parsers of grammars raise has no common type
            raise EngineError(f"the {kind} cannot be used: {one_line(error)}") from error
        if matcher.is_error():
            raise EngineError(f"the {kind} cannot be used: {one_line(ValueError(matcher.get_error()))}")
        return Grammar(matcher, self._vocab)

    @cached_property
    def _words(self) -> Any:
        from llguidance import LLTokenizer

        return LLTokenizer(self._tokenizer.backend_tokenizer.to_str(), n_vocab=self._vocab, eos_token=self._eos)


def _spelled(kind: GrammarKind, source: Any) -> str:
    from llguidance import LLMatcher

    if kind == "regex":
        return LLMatcher.grammar_from_regex(source)
    if kind == "choice":
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in source))
    if kind == "lark":
        return LLMatcher.grammar_from_lark(source)
    if kind == "gbnf":
        from llguidance.gbnf_to_lark import gbnf_to_lark

        return LLMatcher.grammar_from_lark(gbnf_to_lark(source))
    schema: Mapping[str, Any] = _ANY_OBJECT if kind == "json_object" else source
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=_BLANKS)


class Grammar:
    """A text of a grammar in progress (see `Constraint`)."""

    def __init__(self, matcher: Any, vocab: int) -> None:
        self._matcher, self._vocab = matcher, vocab

    def copy(self) -> "Grammar":
        """Return the same place in another text."""
        return Grammar(self._matcher.deep_copy(), self._vocab)

    def allowed(self) -> NDArray[np.bool_]:
        """See `Constraint`."""
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise EngineError(f"the grammar cannot go on: {one_line(ValueError(self._matcher.get_error()))}")
        return np.unpackbits(packed, bitorder="little")[None, : self._vocab].astype(np.bool_)

    def take(self, token: int) -> None:
        """See `Constraint`."""
        self._matcher.consume_token(token)  # an error shows in `allowed`
