"""The JSON of a request's body, checked before it is parsed; independent of the fields.

Depth is checked first because parsers recurse. A regular expression skips the text in strings, so a
long history costs little.
"""

import re
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from mlx_stream.server.api_errors import ApiError

MOST_DEPTH = 32
# Possessive, and with an optional closing quote, so that an unterminated string is matched at once
# and is not retried from each of its quotes.
STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
# JSON allows neither, but many parsers accept them.
NOT_JSON = re.compile(rb"NaN|Infinity")
LONGEST_NAME = 100

Fields = TypeVar("Fields", bound=BaseModel)


def parse_body(body: bytes | bytearray, model: type[Fields]) -> Fields:
    """Return a body's fields.

    Raises:
        ApiError: 400, the body is not JSON, is nested too deeply, or has an invalid field.
    """
    check_structure(body)
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise first_problem(error) from None


def check_structure(body: bytes | bytearray) -> None:
    """Refuse JSON that is nested too deeply, and NaN and Infinity."""
    outside = STRING.sub(b"", body)
    if NOT_JSON.search(outside):
        raise ApiError(400, "the body contains NaN or Infinity, which are not JSON", "not_json")
    depth = 0
    for found in re.finditer(rb"[\[{]|[\]}]", outside):
        depth += 1 if found[0] in b"[{" else -1
        if depth > MOST_DEPTH:
            raise ApiError(400, f"the body exceeds {MOST_DEPTH} levels of nesting", "too_deep")


def first_problem(error: ValidationError) -> ApiError:
    """Return an error for one problem with a body, without quoting the body."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    # Each member of a union yields an error: prefer one that says more than the expected type.
    first = next((one for one in problems if one["type"] == "value_error"), problems[0])
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['msg']}", "not_json")
    names = [str(part) for part in first["loc"] if part != "str" and "[" not in str(part)]
    place = ".".join(names)[:LONGEST_NAME]
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{place}: {message}" if place else message, None, place or None)
