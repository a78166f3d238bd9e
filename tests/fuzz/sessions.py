"""A saved session whose files were altered must not return anything that was not said.

    python -m tests.fuzz.sessions --count 1000 --seed 1

Each altered session is refused in one line, read again with a notice, or exactly what was saved.
Even if checksums were forged too, what is attended is what the transcript says was said.
"""

import gc
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import mlx_stream  # noqa: F401  # isort: skip  # first: it loads OpenBLAS ahead of MLX

import mlx.core as mx
import numpy as np

from mlx_stream.chat import manage
from mlx_stream.chat.resume import BYTES_BESIDE, SessionOptions, open_session
from mlx_stream.chat.saving import SavedSession
from mlx_stream.chat.session_files import session_paths
from mlx_stream.errors import MlxStreamError
from mlx_stream.generate.model import Model
from mlx_stream.load import load
from tests.fakes.conversations import QUESTIONS, leave_unanswered, said
from tests.fakes.killed_chat import OPTIONS, Turn, check_attended, turns_of
from tests.fakes.tiny import write_model
from tests.fuzz import driver
from tests.fuzz.session_mutations import BELIEVED, DATABASES, SNAPSHOTS

SECONDS = 60.0
GROWTH = 96 << 20  # Python and the allocator keep some of what was freed
LONGEST_REPLY = 8
SHORT = replace(OPTIONS, max_tokens=LONGEST_REPLY)


class Broken(AssertionError):
    """An alteration had a forbidden result."""


# --- the session that is altered ---


def prepare(place: Path) -> None:
    """Write a model, a session of it, and files of other sessions next to it."""
    folder, others = write_model(place / "model"), place / "others"
    others.mkdir()
    os.environ["MLX_STREAM_HOME"] = str(place / "home")
    model = load(folder, dtype="float32", keep_quantized=False)
    half = load(folder, dtype="bfloat16", keep_quantized=False)
    for which, name, other in (("session", "y", model), ("model", "x", half)):
        saved = converse(name, other, 9)
        saved.close()
        for file in (saved.paths.snapshot, saved.paths.database):
            shutil.copy(file, others / f"{which}{file.suffix}")
        shutil.rmtree(place / "home")
    saved = converse("x", model, 9)
    saved.write_snapshot()
    shutil.copy(session_paths("x").snapshot, others / "older.safetensors")
    said(saved.chat.reply("One more."))
    saved.write_snapshot()
    shutil.copy(session_paths("x").snapshot, others / "taken_back.safetensors")
    saved.chat.undo()
    said(saved.chat.reply("Another."))
    # A turn during which the program was killed, and another after it.
    leave_unanswered(saved, "Was it killed?")
    saved = open_session("x", model, OPTIONS)
    said(saved.chat.reply("Yes."))
    saved.close()


def converse(name: str, model: Model, turns: int) -> SavedSession:
    saved = open_session(name, model, OPTIONS)
    for turn in range(turns):
        said(saved.chat.reply(QUESTIONS[turn % len(QUESTIONS)]))
    return saved


# --- the results of altering it ---


@dataclass
class Found:
    """What a session contained when it was opened."""

    said: list[Turn]
    state: dict[str, Any]
    reply: str
    bytes: int
    read_again: str


@dataclass
class Judge:
    """Alters copies of the session in `place`, opens them, and reports the results."""

    place: Path
    model: Model
    whole: Found = field(init=False)

    def __post_init__(self) -> None:
        self.fresh()
        self.whole, self.peak = self.measured(SHORT)
        self.fresh()
        session_paths("x").snapshot.unlink()
        self.peak = max(self.peak, self.measured(SHORT)[1])

    def fresh(self) -> None:
        """Put an intact copy of the session where sessions are stored."""
        work = self.place / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        shutil.copytree(self.place / "home", work / "home")
        (work / "others").symlink_to(self.place / "others")
        os.environ["MLX_STREAM_HOME"] = str(work / "home")

    def judge(self, luck: Random) -> tuple[str, driver.Open]:
        """Alter the session once; return what was done, and a function that opens it."""
        self.fresh()
        database = luck.random() < 0.4
        change = luck.choice(DATABASES if database else SNAPSHOTS)
        change(session_paths("x").database if database else session_paths("x").snapshot, luck)
        done = f"{'db' if database else 'kv'} {change.__name__}"
        return done, lambda: self.opened(change in BELIEVED)

    def opened(self, believed: bool) -> tuple[str, str]:
        """Open the session; return `refused`, `read again`, `as it was` or `believed`, and why."""
        with suppress(MlxStreamError):
            manage.verify_session("x")
        try:
            # Options that were not given come from the file.
            options = SessionOptions(sampling=OPTIONS.sampling, max_tokens=LONGEST_REPLY)
            found, peak = self.measured(options)
        except MlxStreamError as error:
            return "refused", line_of(error)
        own = max(found.bytes, self.whole.bytes)
        if peak > self.peak * own / self.whole.bytes + own + 2 * BYTES_BESIDE:
            raise Broken(f"{peak:,} bytes were allocated; a whole one takes {self.peak:,}")
        if believed:
            return "read again" if found.read_again else "believed", found.read_again
        if found.said != self.whole.said:
            raise Broken("an altered transcript was read")
        if found.read_again:
            return "read again", found.read_again
        for name, value in self.whole.state.items():
            if not np.array_equal(found.state[name], value):
                raise Broken(f"an altered state was used: {name}")
        if found.reply != self.whole.reply:
            raise Broken("the reply is another")
        return "as it was", ""

    def measured(self, options: SessionOptions) -> tuple[Found, int]:
        """Open, reply and close; also return the peak bytes that MLX held."""
        gc.collect()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        found = self.found(options)
        return found, mx.get_peak_memory() - before

    def found(self, options: SessionOptions) -> Found:
        notices: list[str] = []
        saved = open_session("x", self.model, options, notices.append)
        try:
            turns = turns_of(saved.store.turns())
            check_attended(saved.chat, turns)
            state = saved.chat.tokens.state()
            plain = {n: np.array(v) if isinstance(v, mx.array) else v for n, v in state.items()}
            again = " ".join(notice for notice in notices if "again" in notice)
            found = Found(turns, plain, "", saved.chat.cache.nbytes, again)
            with suppress(MlxStreamError):
                found = replace(found, reply=said(saved.chat.reply("And now?")))
                check_attended(saved.chat, turns_of(saved.store.turns()))
        finally:
            with suppress(MlxStreamError):
                saved.close()
        # The file has the old contents or the new ones, complete; both can be read again.
        with suppress(MlxStreamError):
            open_session("x", self.model, options).close()
        return found


def line_of(error: MlxStreamError) -> str:
    line = str(error)
    if "\n" in line or not line.isprintable() or len(line) > 1000 or "alloc" in line:
        raise Broken(f"refused by {line!r}")
    return line


def start(place: Path) -> driver.Judge:
    return Judge(place, load(place / "model", dtype="float32", keep_quantized=False)).judge


if __name__ == "__main__":
    driver.main("sessions")
