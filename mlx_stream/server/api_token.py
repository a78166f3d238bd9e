"""The file with the token that clients must send; independent of requests."""

import os
import secrets
import stat
from pathlib import Path

from mlx_stream.errors import ValueRefused

SHORTEST = 16


def read_token(path: Path) -> bytes:
    """Return the token in a file; create the file with a new token if it does not exist.

    Raises:
        ValueRefused: other users can read the file, the token is not valid, or the file cannot be
            read or created.
    """
    try:
        try:
            file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            return write_token(path)
        with os.fdopen(file, "rb") as opened:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise ValueRefused(f"{path}: not a regular file: use another --token-file")
            if status.st_mode & 0o077:
                raise ValueRefused(f"{path}: other users can read this token: run chmod 600 {path}")
            token = opened.read().strip()
    except OSError as error:
        raise ValueRefused(f"{path}: cannot be used as a token file: {error.strerror}") from error
    if len(token) < SHORTEST or not token.isascii() or len(token.split()) != 1:
        raise ValueRefused(
            f"{path}: a token must have at least {SHORTEST} ASCII characters and no spaces: "
            "remove the file, and a new one will be created"
        )
    return token


def write_token(path: Path) -> bytes:
    token = secrets.token_urlsafe(32).encode()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(file, "wb") as opened:
        opened.write(token + b"\n")
    return token
