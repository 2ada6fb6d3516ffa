"""The part of a request that says which form the text has: OpenAI's `response_format`, vLLM's `structured_outputs`."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from spike_export.serving.grammars import GrammarKind
from spike_export.serving.openai.form import Form, needed_if, one_given

MOST_GRAMMAR = 1 << 16
"""Most characters of a grammar."""

Source = tuple[GrammarKind, Any]
"""A kind of grammar, and what it is made of."""


class SchemaFormat(Form):
    """A named JSON schema."""

    name: str = "answer"
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class ResponseFormat(Form):
    """OpenAI's `response_format`."""

    model_config = ConfigDict(
        json_schema_extra=needed_if({"type": {"const": "json_schema"}}, {"json_schema": {"type": "object"}})
    )

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    """llama.cpp's: the schema beside the type `json_object`."""

    @model_validator(mode="after")
    def _require_schema(self) -> "ResponseFormat":
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("type json_schema needs json_schema")
        return self

    @property
    def source(self) -> Source | None:
        """The grammar; None for any text."""
        if self.type == "text":
            return None
        schema = self.schema_ if self.json_schema is None else self.json_schema.schema_
        return ("json_object", None) if schema is None else ("json_schema", schema)


class StructuredOutputs(Form):
    """vLLM's `structured_outputs`: exactly one of its fields."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra=one_given(json="object", regex="string", grammar="string", choice="array")
    )

    json_: Annotated[dict[str, Any] | None, Field(alias="json")] = None
    regex: Annotated[str, Field(min_length=1, max_length=MOST_GRAMMAR)] | None = None
    grammar: Annotated[str, Field(min_length=1, max_length=MOST_GRAMMAR)] | None = None
    choice: Annotated[list[str], Field(min_length=1, max_length=1000)] | None = None

    @model_validator(mode="after")
    def _require_one(self) -> "StructuredOutputs":
        if sum(value is not None for value in (self.json_, self.regex, self.grammar, self.choice)) != 1:
            raise ValueError("give exactly one of json, regex, grammar, choice")
        return self

    @property
    def source(self) -> Source:
        """The grammar; one in Lark's notation is what `grammar` is."""
        if self.json_ is not None:
            return "json_schema", self.json_
        if self.regex is not None:
            return "regex", self.regex
        return ("choice", self.choice) if self.choice is not None else ("lark", self.grammar)
