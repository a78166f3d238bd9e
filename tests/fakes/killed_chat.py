"""A scripted chat that is killed, and the checks afterwards: shared by a test and a script.

The process that is killed talks in a `ChatSession`: it asks, retries, edits, undoes, clears and
cuts replies. It writes a snapshot after every turn, and records its phase in a file of a few bytes,
which outlives it. (tests/cli/test_chat_terminal.py kills the program.)
"""

import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import mlx_stream  # noqa: F401  # isort: skip  # first: it loads OpenBLAS ahead of MLX

from mlx_stream.chat import manage, resume, saving
from mlx_stream.chat.exchange import Exchange, unread_ids
from mlx_stream.chat.resume import SessionOptions, open_session
from mlx_stream.chat.schema import ANSWERED, ASKED, StoredTurn
from mlx_stream.chat.session import ChatSession
from mlx_stream.chat.session_files import session_paths
from mlx_stream.chat.store import Store
from mlx_stream.generate import snapshot
from mlx_stream.generate.model import Model
from mlx_stream.load import load
from mlx_stream.sampling import Sampling
from tests.fakes.conversations import pieces_of

PHASES = ("start", "opening", "reading", "thinking", "reply", "commit", "snapshot", "closing")
# Roughly the seconds that a phase takes: a kill comes at a random moment within them.
LASTS = {"opening": 0.012, "reply": 0.1, "commit": 0.003, "snapshot": 0.006}
WINDOW, LONGEST_REPLY = 150, 24
WORDS = ("the", "and he", "said", "in of", "a hat,", "that", "Wh€n?", "<|im_end|>", "then")
OPTIONS = SessionOptions(
    system="You are brief.", window=WINDOW, sampling=Sampling(1.0), max_tokens=LONGEST_REPLY
)
# Why an intact snapshot may still be insufficient.
HARMLESS = ("they are not in", "there is no snapshot", "undone later")
UNANSWERED = "the last question was not answered because the program ended: /retry answers it"
DEADLINE = 120.0
# A turn: its state, its question, and all of its contents if they are known.
Turn = tuple[str, str, Exchange | None]


# --- the process that is killed ---


class Marks:
    """Bytes in a file: the phase a process is in, and how many times it has entered each phase."""

    def __init__(self, path: Path):
        if not path.exists() or path.stat().st_size == 0:
            path.write_bytes(bytes(1 + len(PHASES)))
        with path.open("r+b") as file:
            self._bytes = mmap.mmap(file.fileno(), 1 + len(PHASES))

    @property
    def phase(self) -> str:
        return PHASES[self._bytes[0]]

    def entered(self, phase: str) -> int:
        return self._bytes[1 + PHASES.index(phase)]

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        before, number = self._bytes[0], PHASES.index(phase)
        self._bytes[0] = number
        self._bytes[1 + number] = min(255, self._bytes[1 + number] + 1)
        try:
            yield
        finally:
            self._bytes[0] = before

    def mark(self, owner: Any, name: str, phase: str) -> None:
        """Mark the phase while a function runs."""
        function: Callable[..., Any] = getattr(owner, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.within(phase):
                return function(*args, **kwargs)

        setattr(owner, name, run)

    def mark_replies(self) -> None:
        steps = ChatSession._turn_steps

        def run(*args: Any) -> Any:
            with self.within("reply"):
                return (yield from steps(*args))

        setattr(ChatSession, "_turn_steps", run)  # noqa: B010


def prepare(marks: Marks) -> None:
    """Write a snapshot after every turn, and mark the phase that this process is in."""
    saving.SECONDS_BETWEEN_SNAPSHOTS = -1
    marks.mark(snapshot, "save_snapshot", "snapshot")
    marks.mark(Store, "write", "commit")
    marks.mark(resume, "open_session", "opening")
    marks.mark_replies()


def tell(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def ask(luck: random.Random) -> str:
    return " ".join(luck.choices(WORDS, k=luck.randint(1, 8)))


def talk(folder: Path, name: str, seed: int) -> None:
    """Talk until killed; announce each action, and report it once it is done."""
    luck, model = random.Random(seed), load(folder, dtype="float32", keep_quantized=False)
    saved = resume.open_session(name, model, OPTIONS)
    for turn in count(1):
        chat, question = saved.chat, ask(luck)
        unanswered = bool(chat.unanswered)
        new = not unanswered and (turn == 1 or not chat.exchanges)
        what = "reply" if new else pick(luck)
        tell(will=what, question=question, number=chat.number, unanswered=unanswered)
        do(chat, what, question, luck)
        last = chat.exchanges[-1:]
        tell(did=what, number=chat.number, exchange=asdict(last[0]) if last else None)
        if turn % 17 == 0:
            saved.close()
            saved = resume.open_session(name, model, OPTIONS)


def pick(luck: random.Random) -> str:
    whats = ("reply", "cut", "retry", "edit", "undo", "clear")
    return luck.choices(whats, (8, 3, 2, 2, 2, 1))[0]


def do(chat: ChatSession, what: str, question: str, luck: random.Random) -> None:
    if what == "undo":
        chat.undo()
    elif what == "clear":
        chat.clear()
    else:
        pieces = pieces_of(chat, what, question)
        for number, _ in enumerate(pieces):
            if what == "cut" and number > luck.randint(0, 3):
                pieces.close()


# --- killing it ---


@dataclass
class Told:
    """What a killed process had printed, and the phase it was in."""

    phase: str
    out: str
    err: str


def killed(command: list[str], marks: Marks, target: str, luck: random.Random) -> Told:
    """Start a process and kill it at a random moment near one of its phases."""
    folder = Path(os.environ["MLX_STREAM_HOME"]).parent
    out, err = folder / "out", folder / "err"
    visit = 1 if target == "opening" else luck.randint(1, 9)
    with out.open("w") as stdout, err.open("w") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr)
        until = time.monotonic() + DEADLINE
        while marks.entered(target) < visit and process.poll() is None:
            assert time.monotonic() < until, f"no {target}: {err.read_text()}"
            time.sleep(0.0002)
        time.sleep(luck.uniform(0, LASTS[target]))
        process.kill()
        code = process.wait()
    told = Told(marks.phase, *(p.read_bytes().decode("utf-8", "replace") for p in (out, err)))
    assert code == -signal.SIGKILL, f"ended with {code} by itself: {told.err}"
    return told


# --- inspecting what is left ---


@dataclass
class Kills:
    """The sessions of one home, which are killed again and again, and what they must hold."""

    model: Model
    folder: Path
    luck: random.Random
    said: dict[str, list[Turn]] = field(default_factory=dict)
    fell: Counter[str] = field(default_factory=Counter)
    committed: int = 0
    reread: int = 0
    unanswered: int = 0

    @property
    def home(self) -> Path:
        return Path(os.environ["MLX_STREAM_HOME"])

    def kill(self, number: int) -> str:
        """Kill once and inspect what is left; return a log line."""
        target = ("snapshot", "commit", "reply", "snapshot", "commit", "opening")[number % 6]
        name = "long" if number % 3 else f"s{number // 9}"
        path = self.home.parent / "marks"
        path.write_bytes(b"")
        told = self._kill_talk(name, target, Marks(path))
        self.fell[told.phase] += 1
        self.look(name)
        turns = self.said[name]
        left = "; one is only asked" if turns and turns[-1][0] == ASKED else ""
        return f"{number}: {name}, near {target}, in {told.phase}; {len(turns)} exchanges{left}"

    def _kill_talk(self, name: str, target: str, marks: Marks) -> Told:
        seed = self.luck.randrange(2**32)
        words = (self.folder, name, seed, self.home.parent / "marks")
        command = [sys.executable, "-m", "tests.fakes.killed_chat", *map(str, words)]
        told = killed(command, marks, target, self.luck)
        possible = [self.said.get(name, [])]
        for line in told.out.splitlines(keepends=True):
            if line.endswith("\n"):
                possible = after(possible[0], json.loads(line))
                self.committed += "did" in line
        self.said[name] = self.found(name, possible)
        return told

    def stored(self, name: str) -> list[Turn]:
        """Return what a transcript holds, from a copy, because the files are used again."""
        with self.copied():
            database = session_paths(name).database
            if not database.exists():
                return []
            with Store.open(database) as store:
                return turns_of(store.turns())

    def found(self, name: str, possible: list[list[Turn]]) -> list[Turn]:
        """Return what a transcript holds, which must be one of the possible contents."""
        now = self.stored(name)
        assert any(same(now, one) for one in possible), f"{name}: {now[-2:]}, not {possible}"
        return now

    @contextmanager
    def copied(self) -> Iterator[Path]:
        home = self.home
        copy = home.with_name("copy")
        shutil.copytree(home, copy)
        os.environ["MLX_STREAM_HOME"] = str(copy)
        try:
            yield copy
        finally:
            os.environ["MLX_STREAM_HOME"] = str(home)
            shutil.rmtree(copy)

    def look(self, name: str) -> None:
        """Check that a session verifies, opens, contains what was said, and continues."""
        assert len(left_over(self.home, name)) <= 2, left_over(self.home, name)
        with self.copied() as copy:
            if session_paths(name).database.exists():
                manage.verify_session(name)
            notices: list[str] = []
            saved = open_session(name, self.model, OPTIONS, notices.append)
            again = [notice for notice in notices if "reading" in notice]
            assert all(any(reason in line for reason in HARMLESS) for line in again), again
            self.reread += len(again)
            said, chat, store = self.said[name], saved.chat, saved.store
            check_attended(chat, said)
            assert len(chat.exchanges) <= store.state.count + 1 - store.state.first
            self.check_unanswered(chat, said, notices)
            answers = bool(chat.unanswered) and self.luck.random() < 0.5
            for _ in chat.retry() if answers else chat.reply("Still there?"):
                pass
            last = chat.exchanges[-1]
            assert last.question == (said[-1][1] if answers else "Still there?")
            now = turns_of(store.turns())
            assert same(now, [*(said[:-1] if answers else said), (ANSWERED, last.question, last)])
            check_attended(chat, now)
            saved.close()
            assert "snapshot after exchange" in manage.verify_session(name)
            assert left_over(copy, name) == []

    def check_unanswered(self, chat: ChatSession, said: list[Turn], notices: list[str]) -> None:
        """Check that an unanswered question is reported, unless it has been cleared."""
        assert (UNANSWERED in notices) == bool(chat.unanswered)
        if chat.unanswered:
            assert said[-1][:2] == (ASKED, chat.unanswered)
            self.unanswered += 1

    def end(self) -> None:
        """Close every session properly; check that the kills left nothing behind."""
        for name in self.said:
            open_session(name, self.model, OPTIONS).close()
            assert left_over(self.home, name) == [], name


def left_over(home: Path, name: str) -> list[str]:
    """Return the names of files that a session left behind besides its own."""
    own = {f"{name}.{end}" for end in ("db", "db-wal", "db-shm", "lock", "safetensors")}
    found = [
        path.name for path in home.glob("s*/*") if path.name.lstrip(".").startswith(f"{name}.")
    ]
    return [each for each in found if each not in own]


def turns_of(turns: list[StoredTurn]) -> list[Turn]:
    """Return what was stored, except what closes a turn, as that depends on what is attended."""
    assert [turn.number for turn in turns] == [*range(1, len(turns) + 1)]
    return [(turn.state, turn.exchange.question, known(turn.exchange)) for turn in turns]


def known(exchange: Exchange) -> Exchange:
    return replace(exchange, closing_ids=())


def after(said: list[Turn], told: dict[str, Any]) -> list[list[Turn]]:
    """Return what a transcript may hold after a process printed a line; known contents first."""
    if "did" in told:
        if told["did"] in ("undo", "clear"):
            return [said[: told["number"]]]
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in told["exchange"].items()
        }
        exchange = Exchange(**values)
        return [[*said[: told["number"] - 1], (ANSWERED, exchange.question, exchange)]]
    what, question, number = told["will"], told["question"], told["number"]
    assert number == len(said), "the process and its transcript count the same turns"
    if what == "clear":
        return [said]
    if what not in ("reply", "cut") and not told["unanswered"]:  # then it is the last attended turn
        number = max(at for at, turn in enumerate(said, 1) if turn[0] == ANSWERED)
    before = said if what in ("reply", "cut") else said[: number - 1]
    if what == "undo":
        return [said, before]
    question = said[number - 1][1] if what == "retry" else question
    asked = [] if what == "retry" else [[*before, (ASKED, question, None)]]
    return [said, *asked, [*before, (ANSWERED, question, None)]]


def same(now: list[Turn], wanted: list[Turn]) -> bool:
    """Return whether a transcript matches the wanted turns; an exchange of None matches any."""
    pairs = zip(now, wanted, strict=False)
    return len(now) == len(wanted) and all(
        one[:2] == other[:2] and (other[2] is None or one[2] == known(other[2]))
        for one, other in pairs
    )


def check_attended(chat: ChatSession, said: list[Turn]) -> None:
    """Check that a stream attends to its pinned beginning and to the end of what was said."""
    held, pinned = chat.exchanges, list(chat.prompts.pinned)
    answered = [exchange for state, _, exchange in said if exchange and state == ANSWERED]
    assert [(e.question, e.reply) for e in held] == [
        (e.question, e.reply) for e in answered[len(answered) - len(held) :]
    ]
    ids = [id for n, e in enumerate(held) for id in ((e.closing_ids if n else ()) + e.ids)]
    unread = unread_ids(pinned, chat.evictor.state.turns, chat.tokens.length)
    ids = ids[: len(ids) - len(unread)]
    attended = chat.tokens.ids.attended()
    assert attended[: len(pinned)] == pinned[: len(attended)]
    # Sinks beyond the pinned ones may belong to an evicted exchange.
    ring = attended[chat.cache.geometry.sinks :]
    assert ring == ids[len(ids) - len(ring) :], "what is attended is not what was said"


def main() -> None:
    """Run the process that is killed, with the arguments FOLDER NAME SEED MARKS."""
    folder, name, seed, marks = sys.argv[1:]
    prepare(Marks(Path(marks)))
    talk(Path(folder), name, int(seed))


if __name__ == "__main__":
    main()
