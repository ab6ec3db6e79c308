"""What the parts of a body have in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Text = Annotated[str, Field(min_length=1)]


class Strict(BaseModel):
    """A part of a body; a field that it does not list is refused by name."""

    model_config = ConfigDict(extra="forbid")
