"""JSON that somebody else made, checked against the types of a class by pydantic.

Strictly: a text is no number, a bool is no number, numbers are finite and whole ones have 64 bits.
"""

import json
import re
from functools import cache
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from secateur.errors import in_one_line, printable

T = TypeVar("T")
Number = Annotated[float, Field(allow_inf_nan=False)]
Whole = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class Fields(BaseModel):
    """The fields that a JSON object must have at least; others may stand beside them."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


def read_as(kind: type[T], value: Any) -> T:
    """A JSON value as an object of a type.

    Raises ValueError, a clause that says where it is not that, what was found and what was wanted:
    "rows.1.kl is 'low', which should be a valid number".
    """
    try:
        return _adapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        raise ValueError(_clause(error)) from error


def is_a(kind: Any, value: Any) -> bool:
    """Whether a JSON value has a type without tuples, such as `list[str]`."""
    try:
        _adapter(kind).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def holds(kind: Any) -> AfterValidator:
    """Of a field whose value stays the object that JSON has: it must be of that type besides."""

    def check(value: Any) -> Any:
        read_as(kind, value)
        return value

    return AfterValidator(check)


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _clause(error: ValidationError) -> str:
    """The first of the errors in words."""
    first = error.errors(include_url=False)[0]
    outer, place = (".".join(map(str, keys)) or "it" for keys in (first["loc"][:-1], first["loc"]))
    match first["type"]:
        case "missing":
            clause = f"{outer} lacks field {first['loc'][-1]!r}"
        case "extra_forbidden" | "unexpected_keyword_argument":
            clause = f"{outer} has an unknown field {first['loc'][-1]!r}"
        case "value_error":
            reason = str(first.get("ctx", {}).get("error"))
            clause = f"{place}: {reason}" if first["loc"] else reason
        case _:
            wanted = re.sub(r"^\w+ should", "which should", first["msg"])
            clause = f"{place} is {repr(first['input'])[:60]}, {wanted}"
    return printable(in_one_line(ValueError(clause)))
