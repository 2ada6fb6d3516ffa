"""What all parts of a request's body have in common, and how the description of the server tells of relations.

Relations between fields are checked where the message can say what to do; the description gets them as JSON schema.
"""

from typing import Any

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


class Form(BaseModel):
    """A part of a request's body: its values have the types that they should have, and unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _whole_numbers_are_integers(cls, body: Any) -> Any:
        """To JSON 1.0 is an integer, and some clients write every number so."""
        return {name: _whole(value) for name, value in body.items()} if isinstance(body, dict) else body


def _whole(value: Any) -> Any:
    """Return whole floats, also in lists, as integers; objects have forms of their own, or are nobody's business."""
    if isinstance(value, list):
        return [_whole(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def at_most(count: int) -> AfterValidator:
    """Bound the items of a list, without a word in the description of the server.

    Lists within this bound can still be too long for the model's context, or for the server's queue, which the
    description does not know: a bound there would promise too much.
    """

    def check(value: list[Any]) -> list[Any]:
        if len(value) > count:
            figures = {"given": len(value), "most": count}
            raise PydanticCustomError("too_long", "{given} items; expected at most {most}", figures)
        return value

    return AfterValidator(check)


MOST_MESSAGES, MOST_PROMPTS, MOST_TOKENS = at_most(4096), at_most(1024), at_most(1 << 20)
"""Of a chat, of a request, of a text: more are refused before any work."""


def one_given(**kinds: str) -> dict[str, Any]:
    """Return the schema of an object that has exactly one of some fields; their types by name."""
    alone = {name: {"required": [name], "properties": {name: {"type": kind}}} for name, kind in kinds.items()}
    return {"oneOf": list(alone.values())}


def needed_if(condition: dict[str, Any], needed: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of an object whose fields have to be like `needed` where they are like `condition`."""

    def having(fields: dict[str, Any]) -> dict[str, Any]:
        return {"required": list(fields), "properties": fields}

    return {"if": having(condition), "then": having(needed)}
