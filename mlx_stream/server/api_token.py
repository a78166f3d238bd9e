"""The file of the token that clients must send; knows no requests."""

import os
import secrets
import stat
from pathlib import Path

from mlx_stream.errors import ValueRefused

SHORTEST = 16


def read_token(path: Path) -> bytes:
    """Return the token in a file, which is made with a new one if it is not there.

    Raises:
        ValueRefused: others may read it, it is too short, or it cannot be read or made.
    """
    try:
        try:
            file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            return write_token(path)
        with os.fdopen(file, "rb") as opened:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise ValueRefused(f"{path}: not a file: give another --token-file")
            if status.st_mode & 0o077:
                raise ValueRefused(f"{path}: others may read this token: chmod 600 {path}")
            token = opened.read().strip()
    except OSError as error:
        raise ValueRefused(f"{path}: cannot be used as a token: {error.strerror}") from error
    if len(token) < SHORTEST or not token.isascii() or len(token.split()) != 1:
        raise ValueRefused(
            f"{path}: a token has at least {SHORTEST} ASCII characters and no spaces: remove the "
            "file, and a new one is written"
        )
    return token


def write_token(path: Path) -> bytes:
    token = secrets.token_urlsafe(32).encode()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(file, "wb") as opened:
        opened.write(token + b"\n")
    return token
