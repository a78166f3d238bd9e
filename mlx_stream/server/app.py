"""The paths of the server, and the layers around them: the gate, errors, the log."""

import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Match, Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_stream.errors import ValueRefused
from mlx_stream.server.api_errors import ApiError, as_api_error
from mlx_stream.server.chat_completions import ChatCompletions
from mlx_stream.server.gate import Gate, GateRules
from mlx_stream.server.metrics import METRICS_TYPE, metrics_text
from mlx_stream.server.service import ModelService
from mlx_stream.server.text_completions import TextCompletions

Handler = Callable[[Request], Awaitable[Any]]
Log = Callable[[str], None]

NOT_OFFERED = {
    "/v1/embeddings": "embeddings are not supported: use a server with an embedding model",
    "/embeddings": "embeddings are not supported: use a server with an embedding model",
}
OLLAMA = "Ollama's own API is not supported: use the OpenAI API, at this address followed by /v1"


def routes_of(service: ModelService) -> list[BaseRoute]:
    """Return every path; those of the API exist with and without /v1."""

    async def list_models(_: Request) -> Response:
        data = [model_object(service, name) for name in service.options.aliases]
        return JSONResponse({"object": "list", "data": data})

    async def show_model(request: Request) -> Response:
        name = request.path_params["id"]
        service.check_name(name)
        return JSONResponse(model_object(service, name))

    async def health(_: Request) -> Response:
        await service.check_health()
        return JSONResponse({"status": "ok" if service.engine else "unloaded"})

    async def not_offered(request: Request) -> Response:
        message = NOT_OFFERED.get(request.url.path, OLLAMA)
        raise ApiError(404, message, "not_offered")

    async def metrics(_: Request) -> Response:
        return Response(metrics_text(service.counters, gauges(service)), media_type=METRICS_TYPE)

    async def list_streams(_: Request) -> Response:
        lines = service.lines.state() if service.lines else []
        return JSONResponse({"streams": [asdict(line) for line in lines]})

    async def close_stream(request: Request) -> Response:
        asked = request.path_params["number"]
        # Not converted by the route itself, because Python refuses to parse thousands of digits.
        number = int(asked) if asked.isascii() and asked.isdigit() and len(asked) < 10 else 0
        try:
            if service.lines is None:
                raise ValueRefused(f"there is no stream {number}")
            service.lines.close(number)
        except ValueRefused as error:
            raise ApiError(404, str(error), "no_such_stream") from error
        return JSONResponse({"id": number, "deleted": True})

    both = ["GET", "POST"]
    api: list[tuple[str, str, Any]] = [
        ("/chat/completions", "POST", ChatCompletions(service)),
        ("/completions", "POST", TextCompletions(service)),
        ("/models", "GET", list_models),
        ("/models/{id:path}", "GET", show_model),
    ]
    return [
        *(
            Route(prefix + path, handler, methods=[method])
            for path, method, handler in api
            for prefix in ("/v1", "")
        ),
        Route("/health", health, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        Route("/mlx_stream/streams", list_streams, methods=["GET"]),
        Route("/mlx_stream/streams/{number}", close_stream, methods=["DELETE"]),
        *(Route(path, not_offered, methods=both) for path in NOT_OFFERED),
        Route("/api/{rest:path}", not_offered, methods=["GET", "POST", "DELETE"]),
    ]


def model_object(service: ModelService, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": service.created, "owned_by": "mlx_stream"}


def gauges(service: ModelService) -> dict[str, float]:
    """Return the current values that `/metrics` shows."""
    lines = service.lines.state() if service.lines else []
    used, limit = service.engine.memory if service.engine else (0, 0)
    return {
        "requests": service.requests,
        "streams": len(lines),
        "streams_replying": sum(line.state == "replying" for line in lines),
        "attended_tokens": sum(line.attended for line in lines),
        "memory_bytes": used,
        "memory_limit_bytes": limit,
        "model_loaded": int(service.engine is not None and service.engine.ready),
    }


def build_app(service: ModelService, rules: GateRules, log: Log) -> ASGIApp:
    """Return the whole application.

    Args:
        log: called with a line for each request: method, path, status, counts, and milliseconds.
    """
    routes = routes_of(service)
    router = Router(routes, redirect_slashes=False, default=no_such_path)
    return RequestLog(Gate(AnswersErrors(router), routes, rules), routes, service, log)


async def no_such_path(scope: Scope, receive: Receive, send: Send) -> None:
    raise ApiError(404, "there is no such path here: the API is under /v1", "no_such_path")


class AnswersErrors:
    """Responds with the error that a handler raises, unless a response has already begun."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, receive, send)
        except Exception as raised:
            if scope["state"].get("answered"):
                raise
            error = as_api_error(raised)
            if error.code == "internal_error":
                scope["state"]["fault"] = place_of(raised)
            response = JSONResponse(error.content, error.status, error.headers)
            await response(scope, receive, send)


def place_of(error: BaseException) -> str:
    """Return an error's type and where it was raised; not its text, which may quote a prompt."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    where = f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else ""
    return f"{type(error).__name__}{where}"


class RequestLog:
    """Logs a line for each request. A path that the server does not have is not quoted."""

    def __init__(self, app: ASGIApp, routes: list[BaseRoute], service: ModelService, log: Log):
        self.app, self.routes, self.service, self.log = app, routes, service, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, status = time.monotonic(), 0
        state = scope["state"] = {**scope.get("state", {})}

        async def send_noting_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                state["answered"] = True
            await send(message)

        try:
            await self.app(scope, receive, send_noting_status)
        except Exception as error:
            state["fault"] = place_of(error)
            raise
        finally:
            path = self._path(scope)
            self.service.counters.statuses[path, status] += 1
            milliseconds = round(1_000 * (time.monotonic() - started))
            counts = "".join(f" {name}={value}" for name, value in state.get("counts", {}).items())
            fault = f" {state['fault']}" if "fault" in state else ""
            method = scope["method"] if scope["method"].isalpha() else "-"
            self.log(f"{method[:10]} {path} {status or '-'}{counts} {milliseconds} ms{fault}")

    def _path(self, scope: Scope) -> str:
        for route in self.routes:
            if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE:
                return route.path
        return "(other)"
