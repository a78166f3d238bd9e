"""The JSON of a request's body, checked before it is parsed; knows no fields.

Depth is checked first: parsers recurse. Text in strings is skipped by a regular expression, so a
long history costs little.
"""

import re
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from mlx_stream.server.api_errors import ApiError

MOST_DEPTH = 32
# Possessive, so that a string without an end is not tried again from each character.
STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
# JSON has neither, but many parsers take them.
NOT_JSON = re.compile(rb"NaN|Infinity")
LONGEST_NAME = 100

Fields = TypeVar("Fields", bound=BaseModel)


def parse_body(body: bytes | bytearray, model: type[Fields]) -> Fields:
    """Return a body's fields.

    Raises:
        ApiError: 400, it is not JSON, it is too deep, or a field does not fit.
    """
    check_structure(body)
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise first_problem(error) from None


def check_structure(body: bytes | bytearray) -> None:
    """Refuse JSON that is nested too deeply, and numbers that are none."""
    outside = STRING.sub(b"", body)
    if NOT_JSON.search(outside):
        raise ApiError(400, "the body has NaN or Infinity, which JSON does not have", "not_json")
    depth = 0
    for found in re.finditer(rb"[\[{]|[\]}]", outside):
        depth += 1 if found[0] in b"[{" else -1
        if depth > MOST_DEPTH:
            raise ApiError(400, f"the body is nested more than {MOST_DEPTH} deep", "too_deep")


def first_problem(error: ValidationError) -> ApiError:
    """Return one thing that is wrong with a body, without what was sent."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    # Of a field that may have several types each is tried: what says more than a type comes first.
    first = next((one for one in problems if one["type"] == "value_error"), problems[0])
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['msg']}", "not_json")
    names = [str(part) for part in first["loc"] if part != "str" and "[" not in str(part)]
    place = ".".join(names)[:LONGEST_NAME]
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{place}: {message}" if place else message, None, place or None)
