"""Refuses requests based on their headers, and reads bodies within limits; independent of the API.

Any page in a browser can send requests to loopback, and its own domain name can be made to point
there (DNS rebinding). So a request must name this server as its Host and must not come from a page
of another origin. All of this is checked before the body is read, on every path.
"""

import asyncio
import hmac
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import unquote

from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_stream.server.api_errors import ApiError

SCHEME = b"http://"
MAX_BODY = 32 * 2**20
# Maximum total size of the bodies in memory, in units of the largest allowed body.
BODIES_AT_ONCE = 4
MOST_DIGITS = 15  # in a Content-Length
SECONDS_BETWEEN_BYTES = 10.0
# How long a refused client may keep sending: if it is cut off, it may not see the error.
SECONDS_TO_DRAIN = 2.0
# Headers that affect a decision, so a request may have each only once.
SINGLE = (
    *("host", "origin", "authorization", "x-api-key", "content-type", "content-length"),
    *("content-encoding", "transfer-encoding", "sec-fetch-site"),
    "x-mlx-stream-session",
)
ALLOWED_HEADERS = "Authorization, Content-Type, X-Api-Key, X-Mlx-Stream-Session"
EXPOSED_HEADERS = "X-Mlx-Stream-Cache, X-Mlx-Stream-Evicted, Retry-After"
SECONDS_OF_PREFLIGHT = 600


class ClientLeft(Exception):
    """The client closed its connection before its request was complete."""


@dataclass(frozen=True)
class GateRules:
    """Which requests are accepted.

    Attributes:
        answers_to: returns whether a Host is the server's; None for a Unix socket, which has no
            name.
        origins: the origins of web pages that may send requests, besides the server's own.
        token: the token that each request must have; None if none is needed.
        max_body: the maximum size of a body, in bytes.
        seconds_between_bytes: how long a body may pause.
    """

    answers_to: Callable[[str], bool] | None
    origins: frozenset[str] = frozenset()
    token: bytes | None = None
    max_body: int = MAX_BODY
    seconds_between_bytes: float = SECONDS_BETWEEN_BYTES


class Gate:
    """An ASGI application in front of another one, which finds the body in `scope["state"]`.

    Args:
        routes: the paths of the application, and their methods.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute], rules: GateRules):
        self.app, self.routes, self.rules = app, routes, rules
        self._bytes = 0  # total size of the bodies in memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers, held = Headers(scope=scope), 0
        send = self._with_origin(headers, send)
        try:
            self._use_path_of_url(scope)
            self._check(scope, headers)
            if self._is_preflight(scope, headers):
                return await send_empty(204, self._preflight(scope), send)
            if scope["method"] == "POST" and self._methods(scope):
                body = await self._read(headers, receive)
                held = len(body)
                scope["state"]["body"] = body
                del body
            await self.app(scope, receive, send)
        except ApiError as error:
            await refuse(error, headers, receive, send)
        except ClientLeft:
            return
        finally:
            self._bytes -= held

    # --- the head ---

    def _use_path_of_url(self, scope: Scope) -> None:
        """If a request has a full URL in place of a path, as for a proxy, keep only its path.

        Raises:
            ApiError: the URL does not name this server.
        """
        raw: bytes = scope["raw_path"]
        if raw[: len(SCHEME)].lower() != SCHEME:
            return
        host, _, path = raw.removeprefix(raw[: len(SCHEME)]).partition(b"/")
        self._check_host(host.decode("latin-1"))
        scope["raw_path"], scope["path"] = b"/" + path, "/" + unquote(path.decode("latin-1"))

    def _check_host(self, host: str) -> None:
        if self.rules.answers_to and not self.rules.answers_to(host.lower()):
            message = "the `Host` header does not name this server: see --allow-host"
            raise ApiError(421, message, "wrong_host")

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Refuse a request based on its headers.

        Raises:
            ApiError: the request is refused.
        """
        for name in SINGLE:
            if len(headers.getlist(name)) > 1:
                raise ApiError(400, f"the header {name} is repeated", "doubled_header")
        self._check_host(headers.get("host", ""))
        self._check_origin(headers)
        if self._is_preflight(scope, headers):  # browsers send no token with it
            return
        methods = self._methods(scope)
        if methods and scope["method"] not in methods:
            allowed = ", ".join(sorted(methods))
            message = f"{scope['method'][:20]} is not allowed here: use {allowed}"
            raise ApiError(405, message, "method", headers={"Allow": allowed})
        self._check_token(headers)
        self._check_body(scope["method"], headers)

    def _check_origin(self, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin in self.rules.origins:
            return
        own = f"http://{headers.get('host', '')}"
        if origin is not None and (origin != own or self.rules.answers_to is None):
            raise ApiError(
                403, "pages from this origin may not use the server: see --allow-origin", "origin"
            )
        if headers.get("sec-fetch-site", "").strip().lower() == "cross-site":
            raise ApiError(403, "pages from other sites may not use the server", "origin")

    def _check_token(self, headers: Headers) -> None:
        if self.rules.token is None:
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            given = headers.get("x-api-key", "")
        if not hmac.compare_digest(given.strip().encode(), self.rules.token):
            message = "the token is missing or wrong: send it as `Authorization: Bearer TOKEN`"
            header = {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, message, "invalid_api_key", headers=header)

    def _check_body(self, method: str, headers: Headers) -> None:
        length, coding = headers.get("content-length"), headers.get("transfer-encoding")
        if method != "POST":
            if coding or length not in (None, "0"):
                raise ApiError(413, f"a {method[:20]} request must not have a body", "body")
            return
        kind, _, options = headers.get("content-type", "").partition(";")
        charset = options.strip().lower().replace('"', "") in ("", "charset=utf-8")
        if kind.strip().lower() != "application/json" or not charset:
            raise ApiError(415, "send `Content-Type: application/json`", "content_type")
        if headers.get("content-encoding", "identity") != "identity":
            raise ApiError(415, "send the body without a Content-Encoding", "content_encoding")
        if length and (len(length) > MOST_DIGITS or int(length) > self.rules.max_body):
            raise self._too_large()

    def _methods(self, scope: Scope) -> set[str]:
        """Return the methods of a path; none if there is no such path."""
        found: set[str] = set()
        for route in self.routes:
            if route.matches(scope)[0] is not Match.NONE:
                found |= getattr(route, "methods", None) or set()
        return found

    def _too_large(self) -> ApiError:
        limit = f"{self.rules.max_body / 2**20:g} MiB"
        return ApiError(413, f"the body is larger than {limit}: see --max-body", "too_large")

    # --- the body ---

    async def _read(self, headers: Headers, receive: Receive) -> bytearray:
        """Return a request's body.

        Raises:
            ApiError: the body is too large or too slow.
            ClientLeft: the client left.
        """
        body, more = bytearray(), True
        try:
            while more:
                message = await self._receive(receive)
                part = message.get("body", b"")
                if len(body) + len(part) > self.rules.max_body:
                    raise self._too_large()
                if self._bytes + len(part) > BODIES_AT_ONCE * self.rules.max_body:
                    raise ApiError(503, "too many large requests at once", "busy")
                body += part
                self._bytes += len(part)
                more = message.get("more_body", False)
        except BaseException:
            self._bytes -= len(body)
            raise
        return body

    async def _receive(self, receive: Receive) -> Message:
        try:
            async with asyncio.timeout(self.rules.seconds_between_bytes):
                message = await receive()
        except TimeoutError:
            raise ApiError(408, "the rest of the body did not arrive in time", "slow") from None
        if message["type"] == "http.disconnect":
            raise ClientLeft
        return message

    # --- pages from other allowed origins ---

    def _is_preflight(self, scope: Scope, headers: Headers) -> bool:
        return scope["method"] == "OPTIONS" and headers.get("origin") in self.rules.origins

    def _preflight(self, scope: Scope) -> dict[str, str]:
        """Return the response to a browser's preflight request."""
        return {
            "Access-Control-Allow-Methods": ", ".join(sorted(self._methods(scope))),
            "Access-Control-Allow-Headers": ALLOWED_HEADERS,
            "Access-Control-Max-Age": str(SECONDS_OF_PREFLIGHT),
            "Content-Length": "0",
        }

    def _with_origin(self, headers: Headers, send: Send) -> Send:
        """Let the requesting page read the response, if its origin is explicitly allowed."""
        origin = headers.get("origin")
        if origin is None or origin not in self.rules.origins:
            return send

        async def send_with_origin(message: Message) -> None:
            if message["type"] == "http.response.start":
                found = MutableHeaders(scope=message)
                found["Access-Control-Allow-Origin"] = origin
                found["Access-Control-Expose-Headers"] = EXPOSED_HEADERS
                found["Vary"] = "Origin"
            await send(message)

        return send_with_origin


async def send_empty(status: int, headers: dict[str, str], send: Send) -> None:
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body"})


async def refuse(error: ApiError, headers: Headers, receive: Receive, send: Send) -> None:
    """Send an error and close the connection, leaving the client time to read it."""
    body = error.body
    raw = [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    raw += [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    sends = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
    if sends and "expect" not in headers:
        with suppress(TimeoutError):
            async with asyncio.timeout(SECONDS_TO_DRAIN):
                message: Message = {"more_body": True}
                while message.get("more_body"):
                    message = await receive()
    await send({"type": "http.response.body"})
