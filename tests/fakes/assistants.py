"""A running assistant, killed and inspected from outside: shared by tests and a long script."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_stream_assistant.errors import AssistantError
from mlx_stream_assistant.paths import assistant_paths
from mlx_stream_assistant.socket_server import request

PROGRAM = ("-m", "mlx_stream_assistant")
DEADLINE = 120.0
# One note of a diary: a heading with its date, text, a line on what it covers.
ENTRY = re.compile(r"## \d{4}-\d\d-\d\d \d\d:\d\d\n\n(?!#).+?\n\n\*[^\n]+ evicted\*\n\n", re.DOTALL)


def command(*words: object) -> list[str]:
    return [sys.executable, *PROGRAM, *map(str, words)]


def told(*words: object, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run a command of the assistant to completion."""
    return subprocess.run(command(*words), capture_output=True, text=True, timeout=DEADLINE, **more)


def asked(what: str, name: str = "main", **more: Any) -> dict[str, Any]:
    """Ask the running assistant; return the text and all other fields of its answer."""
    found: dict[str, Any] = {"text": ""}
    for line in request(assistant_paths(name).socket, name, what=what, **more):
        found["text"] += line.pop("text", "")
        found |= line
    return found


@dataclass
class Running:
    """A process of the assistant; its messages go to a file."""

    words: tuple[object, ...]
    log: Path
    stdin: Any = subprocess.DEVNULL
    environment: dict[str, str] = field(default_factory=dict)
    program: tuple[object, ...] = PROGRAM
    stderr: Any = None

    def __post_init__(self) -> None:
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, (*self.program, "run", *self.words))],
                stdin=self.stdin,
                stdout=log,
                stderr=self.stderr or log,
                env={**os.environ, **self.environment},
            )

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def status(self) -> dict[str, Any]:
        return asked("status")

    def until(
        self, done: Callable[[dict[str, Any]], bool], seconds: float = DEADLINE
    ) -> dict[str, Any]:
        """Wait until its status is `done` and no count changes for a second; return the status."""
        end, status, since, last = time.monotonic() + seconds, {}, 0.0, None
        while time.monotonic() < end:
            assert self.process.poll() is None, f"it has ended: {self.said}"
            try:
                status = self.status()
            except AssistantError:  # the assistant is not listening yet
                status = {}
            seen = [status.get(key) for key in ("attended", "evicted", "bytes_read")]
            if not status or not done(status) or seen != last:
                since, last = time.monotonic(), seen
            elif time.monotonic() - since > 1.0:
                return status
            time.sleep(0.02)
        raise AssertionError(f"not in {seconds} seconds: {status}; {self.said}")

    def until_read(self, count: int, seconds: float = DEADLINE) -> dict[str, Any]:
        """Wait until this many bytes have been read, by the listener too."""

        def done(status: dict[str, Any]) -> bool:
            return status["bytes_read"] >= count and has_caught_up(status)

        return self.until(done, seconds)

    def kill(self) -> None:
        self.process.kill()
        assert self.process.wait() == -signal.SIGKILL, f"it had ended: {self.said}"

    def stop(self) -> float:
        """Stop it as the system does; return the seconds it took."""
        begun = time.monotonic()
        self.process.terminate()
        assert self.process.wait(DEADLINE) == 0, self.said
        return time.monotonic() - begun


def has_caught_up(status: dict[str, Any]) -> bool:
    return status.get("chunks_waiting") == 0 and status.get("backlog") == 0


@dataclass
class Watch:
    """Every chunk a journal ever held, copied before removal; saved in the file `kept`, if any."""

    journal: Path
    kept: Path | None = None
    chunks: dict[int, tuple[str, str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kept and self.kept.exists():
            for line in self.kept.read_text(encoding="utf-8").splitlines():
                number, *chunk = json.loads(line)
                self.chunks[number] = (chunk[0], chunk[1], chunk[2])

    def look(self) -> None:
        """Copy what is new; check that the rest has not changed."""
        if not self.journal.exists():
            return
        last = max(self.chunks, default=0)
        with closing(sqlite3.connect(f"{self.journal.as_uri()}?mode=ro", uri=True)) as connection:
            try:
                # Look again at the last chunks, so that a number used twice would show.
                query = "SELECT number, source, head, text FROM chunks WHERE number >= ?"
                rows = connection.execute(query, (last,)).fetchall()
            except sqlite3.OperationalError:  # the file is being created
                return
        for number, source, head, text in rows:
            assert self.chunks.get(number, (source, head, text)) == (source, head, text)
            if number not in self.chunks and self.kept:
                with self.kept.open("a", encoding="utf-8") as kept:
                    kept.write(json.dumps([number, source, head, text]) + "\n")
            self.chunks[number] = (source, head, text)

    def text(self, source: Path) -> str:
        """Return all text of one source; check that no chunk was missed."""
        numbers = sorted(self.chunks)
        assert numbers == list(range(1, len(numbers) + 1)), "chunks were missed"
        return "".join(self.chunks[n][2] for n in numbers if self.chunks[n][0] == str(source))

    @property
    def fed(self) -> list[str]:
        """What the listener was fed, chunk by chunk."""
        return [self.chunks[n][1] + self.chunks[n][2] for n in sorted(self.chunks)]


def entries(diary: Path) -> list[str]:
    """Return the notes of a diary; check that it holds nothing else."""
    text = diary.read_text(encoding="utf-8") if diary.exists() else ""
    found = ENTRY.findall(text)
    assert "".join(found) == text, f"a diary has more than notes: {text}"
    assert all(entry.count("\n## ") == 0 for entry in found)
    return found
