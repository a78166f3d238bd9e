"""Send a history that grows by a turn each time, and look at what grows in the server's lines.

    python -m tests.long.lines [--turns 5000]

The model is tiny. Every request sends the whole history again, and must be `extended`. Prints one
line of JSON; exits with 1 if a turn's record takes more than 100 bytes, or if anything else
grew. Takes minutes; pytest runs a shorter version.
"""

import argparse
import gc
import json
import sys
import tempfile
from pathlib import Path
from types import FunctionType, ModuleType

import mlx_stream  # noqa: F401  # isort: skip  # first: it loads OpenBLAS ahead of MLX

from mlx_stream.chat.messages import Message
from mlx_stream.server.conversation import conversation_of
from mlx_stream.server.lines import Lines
from tests.fakes.clients import SYSTEM
from tests.fakes.conversations import said
from tests.fakes.engines import GREEDY, engine_of, eventually
from tests.fakes.shell import SMALL
from tests.fakes.tiny import tiny_config, write_letters

MOST_BYTES = 100  # of a turn's record
BYTES_GROWTH = 20_000  # the window may hold a few more turns at the second look than at the first
OBJECT_GROWTH = 200


def reachable_bytes(root: object) -> int:
    """Return the bytes of all Python objects that an object refers to, directly or indirectly."""
    waiting, found, total = [root], {id(root)}, 0
    while waiting:
        each = waiting.pop()
        if isinstance(each, ModuleType | FunctionType | type):
            continue
        total += sys.getsizeof(each)
        for other in gc.get_referents(each):
            if id(other) not in found:
                found.add(id(other))
                waiting.append(other)
    return total


def look(lines: Lines) -> dict[str, int]:
    """Return the bytes that the lines and their engine refer to, and how many objects there are."""
    eventually(lambda: not lines.engine._worker.busy())
    gc.collect()
    record = lines._lines[0].record.nbytes
    objects = sum(not isinstance(each, Message) for each in gc.get_objects())  # not the client's
    return {"bytes": reachable_bytes(lines) - record, "objects": objects, "record": record}


def converse(folder: Path, turns: int) -> dict[str, float]:
    """Hold a conversation; return what has grown since its first half, apart from the record."""
    messages, before = [SYSTEM], {"bytes": 0, "objects": 0}
    with engine_of(folder) as engine:
        lines = Lines(engine, window=120)
        for number in range(turns):
            messages.append(Message("user", f"Question {number}?"))
            reply = lines.begin(conversation_of(messages), max_tokens=4, sampling=GREEDY)
            messages.append(Message("assistant", said(reply)))
            assert reply.cache == ("extended" if number else "new")
            assert reply.evicted_turns > number - 9
            if number == turns // 2:
                before = look(lines)
        after = look(lines)
        assert len(lines.state()) == 1 and lines.state()[0].turns == turns
    grown = {f"{name}_grown": after[name] - before[name] for name in ("bytes", "objects")}
    return {"turns": turns, "record_bytes_per_turn": after["record"] / turns, **grown}


def flat(found: dict[str, float]) -> bool:
    return (
        found["record_bytes_per_turn"] <= MOST_BYTES
        and found["bytes_grown"] <= BYTES_GROWTH
        and found["objects_grown"] <= OBJECT_GROWTH
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5_000)
    turns = parser.parse_args().turns
    with tempfile.TemporaryDirectory() as folder:
        found = converse(write_letters(Path(folder) / "model", tiny_config(**SMALL)), turns)
    print(json.dumps(found))
    sys.exit(not flat(found))


if __name__ == "__main__":
    main()
