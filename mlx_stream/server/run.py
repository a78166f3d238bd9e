"""Runs the server until a signal ends it: sockets, uvicorn, the shutdown order."""

import asyncio
import contextlib
import logging
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import uvicorn

from mlx_stream.program.exits import ENDING
from mlx_stream.server.app import build_app
from mlx_stream.server.connection import MOST_CONNECTIONS, TimedConnection
from mlx_stream.server.gate import GateRules
from mlx_stream.server.listening import Listening
from mlx_stream.server.service import ModelService, ServiceOptions

SECONDS_TO_KEEP_ALIVE = 30
# Time for streams to end with an error after the signal; the engine has its own limit.
SECONDS_FOR_LAST_BYTES = 1
SPARE_FILES = 128

Notify = Callable[[str], None]


class Server(uvicorn.Server):
    """uvicorn's server, with signals left to `run_server`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run_server(
    options: ServiceOptions, rules: GateRules, listening: Listening, notify: Notify, log: Notify
) -> tuple[int, bool]:
    """Serve until SIGINT, SIGTERM or SIGHUP.

    Args:
        notify: called with lines for the user.
        log: called with a line for each request.

    Returns:
        The signal's number, and whether everything was released in time.

    Raises:
        ValueRefused, SessionError: see `ModelService`.
    """
    raise_file_limit()
    try:
        service = ModelService(options, notify)
        try:
            number = asyncio.run(serve_until_signal(service, rules, listening, log))
        except BaseException:
            service.close()
            raise
    finally:
        remove_socket(listening)
    return number, service.close()


async def serve_until_signal(
    service: ModelService, rules: GateRules, listening: Listening, log: Notify
) -> int:
    ended: list[int] = []
    loop, asked = asyncio.get_running_loop(), asyncio.Event()

    def end(number: int) -> None:
        ended.append(number)
        for one in signals:  # a second signal ends the process immediately
            loop.remove_signal_handler(one)
            signal.signal(one, signal.SIG_DFL)
        asked.set()

    signals = [one for one in (*ENDING, signal.SIGINT) if signal.getsignal(one) != signal.SIG_IGN]
    for one in signals:
        loop.add_signal_handler(one, end, one)
    await serve_until(asked, service, rules, listening, log)
    return ended[0]


async def serve_until(
    asked: asyncio.Event,
    service: ModelService,
    rules: GateRules,
    listening: Listening,
    log: Notify,
) -> None:
    """Serve until an event is set; replies in progress then end with an error."""
    server = build_server(service, rules, listening, log)
    service.notify(f"listening on {listening.url}; loading {service.name}")
    serving = asyncio.create_task(server.serve([*listening.sockets]))
    tasks = [asyncio.create_task(service.report_loading())]
    if service.options.idle_unload is not None:
        tasks.append(asyncio.create_task(service.unload_when_idle()))
    await asked.wait()
    for task in tasks:
        task.cancel()
    service.stopping.set()
    server.should_exit = True
    await serving


def build_server(
    service: ModelService, rules: GateRules, listening: Listening, log: Notify
) -> Server:
    # Its messages would quote what clients sent.
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi"):
        logging.getLogger(name).disabled = True
    answers_to = None if listening.hosts is None else listening.answers_to
    config = uvicorn.Config(
        build_app(service, replace(rules, answers_to=answers_to), log),
        http=TimedConnection,
        loop="asyncio",
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=SECONDS_TO_KEEP_ALIVE,
        timeout_graceful_shutdown=SECONDS_FOR_LAST_BYTES,
    )
    return Server(config)


def raise_file_limit() -> None:
    """Raise this process's limit on open files to the maximum, to allow more connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_CONNECTIONS + SPARE_FILES
    limit = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    if soft != resource.RLIM_INFINITY and soft < limit:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    now = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if now != resource.RLIM_INFINITY:
        TimedConnection.most = max(16, min(MOST_CONNECTIONS, now - SPARE_FILES))


def remove_socket(listening: Listening) -> None:
    """Remove the file of a Unix socket."""
    if listening.url.startswith("unix:"):
        with suppress(OSError):
            Path(listening.url.removeprefix("unix:")).unlink()
