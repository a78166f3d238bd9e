"""Attaches text files to a question that names them, such as `Summarize @notes.txt`."""

import re
from collections.abc import Callable
from pathlib import Path

from mlx_stream.cli.terminal import read_text
from mlx_stream.errors import TextError

# @name or @"a name with spaces", at the beginning or after a space.
NAMED_FILE = re.compile(r'(?<!\S)@(?:"([^"\n]+)"|(\S*[^\s.,;:!?]))')


# Text that looks like a path even if no such file exists: ./x, notes.txt, but not @someone.
LIKE_PATH = re.compile(r".*[^/]/.*|.*/[^/].*|.*\.[a-zA-Z]\w{0,4}")


def attach_files(question: str, notify: Callable[[str], None]) -> str:
    """Return a question with the text of each file that it names; report how long each is.

    Anything that is not the name of a file is left unchanged, with a notice if it looks like one.

    Raises:
        TextError: a file cannot be read, is not text, or is empty.
    """
    parts, done = [question], set[Path]()
    for found in NAMED_FILE.finditer(question):
        path = path_of(name := found[1] or found[2])
        if path is None and (found[1] or LIKE_PATH.fullmatch(name)):
            notify(f"there is no file {name}: the question is sent as it is")
        if path and path not in done:
            done.add(path)
            parts.append(f"{path.name}:\n\n{text_of(path, notify)}")
    return "\n\n".join(parts)


def path_of(name: str) -> Path | None:
    try:
        path = Path(name).expanduser()
        return path if path.is_file() else None
    except (OSError, RuntimeError, ValueError):  # too long for a name, or no such user
        return None


def text_of(path: Path, notify: Callable[[str], None]) -> str:
    text = read_text(str(path))
    if "\0" in text:
        raise TextError(f"{path}: is not a text file")
    notify(f"{path.name} is part of the question: {len(text):,} characters")
    return text


def naming(argument: str) -> str:
    """Return the beginning of a question about a file.

    Raises:
        TextError: the file does not exist.
    """
    name = argument.strip("'\"")
    if not path_of(name):
        raise TextError(f"{name}: there is no such file")
    return f'@"{name}" ' if re.search(r"\s", name) else f"@{name} "
