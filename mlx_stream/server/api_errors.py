"""Errors in the format of OpenAI's API, with an HTTP status for each; independent of requests."""

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from mlx_stream.errors import (
    ComputeError,
    EngineClosed,
    MemoryRefused,
    MlxStreamError,
    QueueFull,
    SessionError,
    SourceError,
    TemplateError,
    TextError,
    ValueRefused,
    one_line,
)
from mlx_stream.server.line_reply import LineClosed

INVALID, SERVER = "invalid_request_error", "server_error"
SECONDS_TO_RETRY = 2
STATUSES: tuple[tuple[type[MlxStreamError], int, str | None], ...] = (
    (ValueRefused, 400, None),
    (TextError, 400, None),
    (TemplateError, 400, "template_refused"),
    (QueueFull, 503, "queue_full"),
    (MemoryRefused, 503, "no_memory"),
    (LineClosed, 503, "stream_closed"),
    (EngineClosed, 503, "shutting_down"),
    (SessionError, 409, "session"),
    (SourceError, 503, "no_model"),
    (ComputeError, 500, "compute_failed"),
)


class ApiError(Exception):
    """An error response.

    Attributes:
        status: the HTTP status.
        code: what went wrong, for programs.
        param: the field of the request that is wrong.
        headers: response headers besides its type and length.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            self.headers.setdefault("Retry-After", str(SECONDS_TO_RETRY))

    @property
    def content(self) -> dict[str, Any]:
        """The object that the client gets."""
        kind = SERVER if self.status >= HTTPStatus.INTERNAL_SERVER_ERROR else INVALID
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def body(self) -> bytes:
        return json.dumps(self.content).encode()


def as_api_error(error: Exception) -> ApiError:
    """Return an error in the API's form; an unexpected error is reported without details."""
    if isinstance(error, ApiError):
        return error
    for kind, status, code in STATUSES:
        if isinstance(error, kind):
            return ApiError(status, one_line(error), code)
    if isinstance(error, MlxStreamError):
        return ApiError(500, one_line(error))
    return ApiError(500, "internal server error: see the server's log", "internal_error")
