"""Models that a file of our own is checked by when it is read back."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class Stored(BaseModel):
    """An object in a file that this program wrote. Fields that a model does not name are kept as they are."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


Whole = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]

Positive = Annotated[Whole, Field(ge=1)]

Natural = Annotated[Whole, Field(ge=0)]

Object = dict[str, Any]


def mistake_in(value: Any, wanted: type[BaseModel]) -> str | None:
    """The first thing in `value` that is not as `wanted` has it, in words."""
    try:
        wanted.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(step) for step in first["loc"])
        return f"{place}: {first['msg']}" if place else first["msg"]
    return None
