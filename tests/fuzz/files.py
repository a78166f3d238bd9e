"""Alters any file at random: its bytes, its tensor header, or what is in its place.

An alteration takes a path and random numbers. The module also defines numbers that no file should
contain.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

Change = Callable[[Path, Random], None]
HUGE = (2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 10**30)
NUMBERS = (-1, 0, 1, 2, 3, 7, 10_001, 10**12, 2**64, -(2**31), -(2**63), *HUGE)
FLOATS = (0.0, -0.5, 1.5, 1e-300, 1e300, float("nan"), float("inf"))
WORDS = ("", "a", "../up", "/etc/passwd", "a\0b", "x" * 3_000, "é😀", "\u202e", "<|im_end|>", "\n")
VALUES: tuple[Any, ...] = (
    *NUMBERS * 2,
    *FLOATS,
    *WORDS,
    *(None, True, False, [], {}, [[]], {"a": None}, "1", [1, "a"], list(range(2_000))),
)
DEPTH = 100_000


# --- bytes ---


def scramble(path: Path, luck: Random, begin: int = 0, end: int | None = None) -> None:
    """Change some bytes between two offsets."""
    data = bytearray(path.read_bytes())
    for _ in range(luck.randint(1, 6)):
        at = luck.randrange(begin, max(begin + 1, len(data) if end is None else end))
        width = luck.choice((1, 1, 2, 4, 8))
        new = luck.choice((b"\0", b"\xff", b"\x7f", b"\x80", b"\x01")) * width
        data[at : at + width] = luck.choice((new, luck.randbytes(width)))
    path.write_bytes(data)


def flip(path: Path, luck: Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(luck.randint(1, 3) if data else 0):
        front = luck.choice((8, 100, 4000, len(data), len(data)))
        data[luck.randrange(min(len(data), front))] ^= 1 << luck.randrange(8)
    path.write_bytes(data)


def cut(path: Path, luck: Random) -> None:
    size = max(1, path.stat().st_size)
    lengths = (0, 1, 7, 8, 9, 100, size - 1, luck.randrange(min(size, 400)), luck.randrange(size))
    os.truncate(path, luck.choice(lengths))


def lengthen(path: Path, luck: Random) -> None:
    with path.open("ab") as file:
        file.write(luck.randbytes(luck.choice((1, 8, 4096, 100_000))))


def make_huge(path: Path, luck: Random) -> None:
    os.truncate(path, luck.choice((2**31, 2**36, 2**40)))  # the file is sparse


def blank(path: Path, luck: Random) -> None:
    data = bytearray(path.read_bytes())
    at, count = luck.randrange(len(data)), luck.choice((1, 16, 4096))
    data[at : at + count] = luck.choice((bytes, luck.randbytes))(len(data[at : at + count]))
    path.write_bytes(data)


def swap(path: Path, luck: Random) -> None:
    data = bytearray(path.read_bytes())
    size = min(luck.choice((64, 4096)), len(data))
    a, b = (size * luck.randrange(len(data) // size) for _ in range(2))
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]
    path.write_bytes(data)


def noise(path: Path, luck: Random) -> None:
    path.write_bytes(luck.randbytes(luck.choice((1, 8, 1000, 50_000))))


# --- something else in its place ---


def folder(path: Path, luck: Random) -> None:
    path.unlink()
    path.mkdir()
    if luck.random() < 0.5:
        (path / "x").write_text("x")


def pipe(path: Path, luck: Random) -> None:
    path.unlink()
    os.mkfifo(path)


def link(path: Path, luck: Random) -> None:
    whole = path.rename(path.with_name("elsewhere"))
    if luck.random() < 0.3:
        os.truncate(whole, 2**36)
    targets = (whole, path, "/nowhere", path.parent, "/dev/zero", "/etc/passwd")
    path.symlink_to(luck.choice(targets))


def nothing(path: Path, luck: Random) -> None:
    path.unlink()


BYTES: tuple[Change, ...] = (flip, flip, scramble, cut, lengthen, blank, swap, noise, make_huge)
INSTEAD: tuple[Change, ...] = (folder, pipe, link)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


# --- JSON ---


def places(value: Any) -> list[tuple[Any, Any]]:
    """List every (container, key) in a JSON value, at most a few thousand."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting and len(found) < 5_000:
        node = waiting.pop(0)
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, child in list(items):
            found.append((node, key))
            if isinstance(child, dict | list):
                waiting.append(child)
    return found


def change_json(value: Any, luck: Random, names: Sequence[str] = ("more",)) -> str:
    """Change one place in a JSON value; return what was done.

    Args:
        names: keys that may be added.
    """
    # Most of a tokenizer is its vocabulary: shallow places come first in the list.
    if not (nodes := places(value)):
        return "nothing to change"
    near = min(len(nodes), luck.choice((12, 60, len(nodes))))
    node, key = luck.choice(nodes[:near])
    way = luck.choice(("set", "set", "set", "shift", "drop", "add", "swap"))
    if way == "drop":
        node.pop(key) if isinstance(node, dict) else node.__delitem__(key)
    elif way == "add" and isinstance(value, dict):
        key = luck.choice(names)
        value[key] = luck.choice(VALUES)
    elif way == "swap":
        other, place = luck.choice(nodes)
        try:
            node[key], other[place] = other[place], node[key]
        except (KeyError, IndexError):
            node[key] = None
    elif way == "shift" and type(node[key]) is int:
        node[key] += luck.choice((-500, -20, -1, 1, 20, 500, *HUGE))
    else:
        node[key] = luck.choice(VALUES)
    return f"{way} {str(key)[:40]!r}"


def dumps(value: Any) -> str:
    try:
        return json.dumps(value)
    except (RecursionError, ValueError):  # it was swapped into itself
        return "[" * 5_000


# --- the header of a tensor file ---


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return the header of a tensor file, and what follows it."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def forge_tensors(path: Path, luck: Random) -> None:
    header, body = header_of(path)
    name, other = luck.sample([name for name in header if name != "__metadata__"], 2)
    entry, text, huge = header[name], "", luck.choice((*HUGE, -1, 0))
    shape: list[int] = entry["shape"]
    shapes = [*VALUES, [2**31 - 1] * 2, [huge, 4], [huge], [huge] * 4, [0], [1] * 999, [2**32] * 3]
    dtypes = ("F16", "BF16", "F64", "I8", "I32", "U32", "U8", "BOOL", "F4", "C64", "", "x", 3)
    lies: list[Callable[[], Any]] = [
        lambda: entry["data_offsets"].__setitem__(
            luck.randrange(2), luck.choice((*VALUES, 4, len(body), len(body) + 4))
        ),
        lambda: entry.update(data_offsets=[luck.choice((0, huge)), huge]),
        lambda: entry.update(data_offsets=header[other]["data_offsets"]),
        lambda: entry.update(shape=luck.choice((*shapes, shape[::-1], [1] * 40 + shape))),
        lambda: entry.update(dtype=luck.choice(dtypes)),
        lambda: header.update({name: header[other], other: header[name]}),
        lambda: header.pop(name),
        lambda: header.update({luck.choice((f"{name}x", "", "\n", "x" * 3_000)): header.pop(name)}),
        lambda: header.update({f"w{i}": {**entry, "shape": [0]} for i in range(3_000)}),
        lambda: header.update(
            __metadata__=luck.choice((*VALUES, {"header": "[" * DEPTH, "checksum": ""}))
        ),
        lambda: dumps(header)[:-1] + f', "{name}": {json.dumps(header[other])}}}',
        lambda: "[" * DEPTH,
    ]
    if isinstance(said := luck.choice(lies)(), str):
        text = said
    new = (text or dumps(header)).encode()
    size = luck.choice((*(len(new),) * 9, len(new) + 8, 1, *HUGE[:-2]))
    path.write_bytes(struct.pack("<Q", size) + new + body)
