"""What all parts of a request's body have in common."""

from pydantic import BaseModel, ConfigDict


class Form(BaseModel):
    """A part of a request's body: its values have the types that they should have, and unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", populate_by_name=True)
