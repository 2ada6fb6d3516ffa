"""What all parts of a request's body have in common, and how the description of the server tells of relations.

Relations between fields are checked where the message can say what to do; the description gets them as JSON schema.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict


class Form(BaseModel):
    """A part of a request's body: its values have the types that they should have, and unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", populate_by_name=True)


def one_given(**kinds: str) -> dict[str, Any]:
    """Return the schema of an object that has exactly one of some fields; their types by name."""
    alone = {name: {"required": [name], "properties": {name: {"type": kind}}} for name, kind in kinds.items()}
    return {"oneOf": list(alone.values())}


def needed_if(condition: dict[str, Any], needed: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of an object whose fields have to be like `needed` where they are like `condition`."""

    def having(fields: dict[str, Any]) -> dict[str, Any]:
        return {"required": list(fields), "properties": fields}

    return {"if": having(condition), "then": having(needed)}
