"""`mlx_stream serve`: a server for OpenAI's API, in a terminal or at each login."""

import os
import sys
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from mlx_stream.cli import options
from mlx_stream.errors import MlxStreamError, ValueRefused, one_line
from mlx_stream.program.exits import fail, notify

ACTIONS = ("install", "uninstall")
LOOPBACK = "localhost"


@dataclass(frozen=True)
class ListenOptions:
    """Where a server listens, and which clients it accepts."""

    host: Annotated[
        str,
        Option(
            help="Address to listen on; any other than localhost (127.0.0.1 and ::1) needs a token."
        ),
    ] = LOOPBACK
    port: Annotated[int, Option(help="Port to listen on; 0 picks a free port.")] = 8085
    socket: Annotated[
        Path | None,
        Option(help="Unix socket to listen on instead of a port; only you can use it."),
    ] = None
    token_file: Annotated[
        Path | None,
        Option(help="File with the token that clients must send. If it is missing, it is created."),
    ] = None
    allow_origin: Annotated[
        list[str] | None,
        Option(
            help="Origin of web pages that may use the server, such as http://localhost:3000. "
            "Repeatable."
        ),
    ] = None
    allow_host: Annotated[
        list[str] | None,
        Option(
            help="Additional host name of the server, such as host.docker.internal. Repeatable."
        ),
    ] = None
    max_body: Annotated[int, Option(help="Maximum request size, in MiB.")] = 32


@dataclass(frozen=True)
class ServiceChoices:
    """What is served, and how many conversations and requests at once."""

    streams: Annotated[int, Option(help="Number of conversations kept in memory.")] = 4
    queue: Annotated[
        int, Option(help="Number of requests that may wait while all streams are busy.")
    ] = 16
    alias: Annotated[
        list[str] | None,
        Option(help="Model name that clients can use. Repeatable. Default: the model's own."),
    ] = None
    any_model: Annotated[
        bool, Option("--any-model", help="Also answer requests for any other name.")
    ] = False
    sessions: Annotated[
        bool,
        Option("--sessions", help="Let clients continue saved conversations by name."),
    ] = False
    recall: Annotated[
        int,
        Option(
            help="Number of tokens of a saved conversation's window to reserve for quoting evicted "
            "exchanges."
        ),
    ] = 0
    keep: Annotated[
        Path | None,
        Option(
            metavar="DIR",
            help="Folder for keeping conversations after they are closed or the server exits. "
            "It will contain their text. Default: none.",
        ),
    ] = None
    keep_size: Annotated[
        float, Option(metavar="GIB", help="Maximum size of the --keep folder, in GiB.")
    ] = 8
    idle_unload: Annotated[
        float | None,
        Option(
            metavar="MINUTES",
            help="Minutes without a request after which the weights are unloaded. Default: never.",
        ),
    ] = None
    dtype: options.Dtype = None
    keep_quantized: options.KeepQuantized = None


@options.verb
def serve(
    *,
    words: Annotated[
        list[str] | None,
        Argument(
            metavar="[install|uninstall] [MODEL]",
            help="A folder, a Hub id, a .gguf file, or starter. Default: the config file's, else "
            "the starter. install starts the server now and at each login; uninstall undoes that.",
            show_default=False,
        ),
    ] = None,
    listen: ListenOptions,
    window: options.WindowOptions,
    choices: ServiceChoices,
) -> None:
    """Serve a model to clients of OpenAI's API.

    Clients send their whole history each time; the server reads only what is new. Ctrl-C stops it,
    and so does closing its terminal.
    """
    from mlx_stream.server.running import AGENT

    action, model = parse_words(words or [])
    groups = (listen, window, choices)
    try:
        if action == "uninstall":
            if model is not None or any(group != type(group)() for group in groups):
                raise ValueRefused("uninstall takes no MODEL and no options")
            uninstall()
        else:
            check(listen)
            source = options.default_model() if model is None else model
            (install if action else serve_here)(source, listen, window, choices)
    except MlxStreamError as error:
        if AGENT not in os.environ:
            raise
        notify(one_line(error), dim=False)  # launchd would restart it
        raise SystemExit(0) from None


def parse_words(words: list[str]) -> tuple[str | None, str | None]:
    """Return the action and the model from a command's arguments; None for either if missing."""
    action = words.pop(0) if words and words[0] in ACTIONS else None
    if len(words) > 1:
        raise ValueRefused(f"only one model can be served: leave out {words[1]!r}")
    return action, words[0] if words else None


def check(listen: ListenOptions) -> None:
    """Refuse options that cannot be combined.

    Raises:
        ValueRefused: options contradict each other.
    """
    if listen.max_body < 1:
        raise ValueRefused(f"--max-body must be at least 1, not {listen.max_body}")
    for origin in listen.allow_origin or ():
        scheme, found, host = origin.partition("://")
        if scheme not in ("http", "https") or not found or not host or set(host) & set("/*?# "):
            raise ValueRefused(
                f"--allow-origin {origin}: use a scheme, a host and a port, such as "
                "http://localhost:3000"
            )
    try:
        from mlx_stream.server.listening import is_loopback
        from mlx_stream.server.run import run_server  # noqa: F401
    except ModuleNotFoundError as error:
        fail(f"serve needs {error.name}, which is not installed: pip install 'mlx_stream[server]'")
    if listen.socket is None and not is_loopback(listen.host) and listen.token_file is None:
        raise ValueRefused(
            f"--host {listen.host} lets other machines connect: add --token-file FILE, "
            "or leave out --host"
        )


def serve_here(
    source: str, listen: ListenOptions, window: options.WindowOptions, choices: ServiceChoices
) -> None:
    """Serve until a signal ends the process."""
    from mlx_stream.server.api_token import read_token
    from mlx_stream.server.gate import GateRules
    from mlx_stream.server.listening import listen_on_path, listen_on_port
    from mlx_stream.server.run import run_server
    from mlx_stream.server.running import claim_place
    from mlx_stream.server.service import ServiceOptions, default_alias

    given = {**vars(choices), **vars(window)}
    aliases = tuple(given.pop("alias") or [default_alias(source)])
    service = ServiceOptions(source, aliases, **given)
    token = read_token(listen.token_file) if listen.token_file else None
    origins = frozenset(origin.lower() for origin in listen.allow_origin or ())
    rules = GateRules(None, origins, token, listen.max_body * 2**20)
    if listen.socket:
        listening = listen_on_path(listen.socket.absolute())
    else:
        listening = listen_on_port(listen.host, listen.port, listen.allow_host or ())
    with closing(claim_place(listening.url)):
        number, released = run_server(service, rules, listening, notify, notify)
    if not released:  # a step takes too long, and the interpreter's exit would wait for it
        os._exit(128 + number)
    raise SystemExit(128 + number)


def install(
    source: str, listen: ListenOptions, window: options.WindowOptions, choices: ServiceChoices
) -> None:
    """Start the server now and at each login."""
    from mlx_stream.program.login_service import LoginService
    from mlx_stream.server.running import AGENT, SERVICE, server_log

    folder = Path(source).expanduser()
    model = str(folder.absolute()) if folder.exists() else source
    given = [word for group in (listen, window, choices) for word in option_words(group)]
    command = (sys.executable, "-P", "-m", "mlx_stream", "serve", model, *given)
    service = LoginService(
        SERVICE,
        "mlx_stream server",
        command,
        server_log(),
        AGENT,
        {"ProcessType": "Interactive"},
        ("SuccessExitStatus=143",),  # when the server is told to stop
    )
    path, trouble = service.install()
    if trouble:
        fail(f"installed at {path}, but it could not be started: {trouble}")
    notify(f"installed at {path}")


def uninstall() -> None:
    """Stop the server, and no longer start it at login."""
    from mlx_stream.program.login_service import uninstall_service
    from mlx_stream.server.running import SERVICE

    path = uninstall_service(SERVICE)
    if path is None:
        fail("the server is not installed")
    notify(f"removed {path}")


def option_words(group: Any) -> list[str]:
    """Return the command-line options that set a group's values, with absolute paths."""
    found = []
    for field in fields(group):
        value, name = getattr(group, field.name), f"--{field.name.replace('_', '-')}"
        if value == field.default:
            continue
        if field.name == "keep_quantized":
            found.append(name if value else "--dequantize")
        elif value is True:
            found.append(name)
        else:
            for one in value if isinstance(value, list) else [value]:
                found.append(f"{name}={one.absolute() if isinstance(one, Path) else one}")
    return found
