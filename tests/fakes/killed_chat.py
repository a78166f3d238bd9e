"""A scripted chat that is killed, and what is looked at afterwards: shared by a test and a script.

What is killed is the program: `mlx_stream chat` reading a pipe, or a talk of the same
`Conversation` objects that also retries, edits, undoes and cuts replies. Both write a snapshot
after every turn, and where they are into a file of a few bytes, which outlives them.
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
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import mlx_stream  # noqa: F401  # isort: skip  # first: it loads OpenBLAS ahead of MLX

from mlx_stream.chat import conversation as conversations
from mlx_stream.chat import manage, resume
from mlx_stream.chat.conversation import Change, Conversation
from mlx_stream.chat.exchange import Exchange
from mlx_stream.chat.resume import SessionOptions, open_session
from mlx_stream.chat.session import ChatSession
from mlx_stream.chat.session_files import session_paths
from mlx_stream.chat.store import Store
from mlx_stream.generate import snapshot
from mlx_stream.load import Model, load
from mlx_stream.sampling import Sampling
from tests.fakes.tiny import tiny_config, tiny_weights, write_tiny

PHASES = ("start", "opening", "reply", "commit", "snapshot", "between")
# Seconds a phase takes, roughly: a kill falls at a random moment of as long.
LASTS = {"opening": 0.012, "reply": 0.1, "commit": 0.003, "snapshot": 0.006}
WINDOW, LONGEST_REPLY = 150, 24
WORDS = ("the", "and he", "said", "in of", "a hat,", "that", "Wh€n?", "<|im_end|>", "then")
OPTIONS = SessionOptions(
    system="You are brief.", window=WINDOW, sampling=Sampling(1.0), max_tokens=LONGEST_REPLY
)
# Why a snapshot that is whole may still not be all that is needed.
HARMLESS = ("they are not in", "there is no snapshot", "taken back since")
DEADLINE = 120.0


def tiny_folder(folder: Path) -> Path:
    config = tiny_config(max_position_embeddings=512)
    return write_tiny(folder, config, tiny_weights(config))


# --- the process that is killed ---


class Marks:
    """Bytes in a file: the phase a process is in, and how often it entered each."""

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
        """Have a function say when it runs."""
        function: Callable[..., Any] = getattr(owner, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.within(phase):
                return function(*args, **kwargs)

        setattr(owner, name, run)

    def mark_replies(self) -> None:
        pieces = ChatSession._pieces

        def run(*args: Any) -> Iterator[Any]:
            with self.within("reply"):
                yield from pieces(*args)

        setattr(ChatSession, "_pieces", run)  # noqa: B010


def prepare(marks: Marks) -> None:
    """Write a snapshot after every turn, and say where this process is."""
    conversations.SECONDS_BETWEEN_SNAPSHOTS = -1
    marks.mark(snapshot, "save_snapshot", "snapshot")
    marks.mark(Change, "write", "commit")
    marks.mark(resume, "open_session", "opening")
    marks.mark_replies()


def tell(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def ask(luck: random.Random) -> str:
    return " ".join(luck.choices(WORDS, k=luck.randint(1, 8)))


def talk(folder: Path, name: str, seed: int) -> None:
    """Talk for ever; say what comes next, and what was done once it is done."""
    luck, model = random.Random(seed), load(folder, dtype="float32", keep_quantized=False)
    conversation = resume.open_session(name, model, OPTIONS)
    for turn in count(1):
        what = "reply" if turn == 1 or not conversation.last else pick(luck)
        question = ask(luck)
        tell(will=what, question=question)
        do(conversation, what, question, luck)
        last = conversation.last
        tell(did=what, exchange=asdict(last) if last else None)
        if turn % 17 == 0:
            conversation.close()
            conversation = resume.open_session(name, model, OPTIONS)


def pick(luck: random.Random) -> str:
    whats = ("reply", "cut", "retry", "edit", "undo", "clear")
    return luck.choices(whats, (8, 3, 2, 2, 2, 1))[0]


def do(conversation: Conversation, what: str, question: str, luck: random.Random) -> None:
    if what == "undo":
        conversation.undo()
    elif what == "clear":
        conversation.clear()
    else:
        made = {"retry": conversation.retry, "edit": lambda: conversation.edit(question)}
        pieces = made.get(what, lambda: conversation.reply(question))()
        for number, _ in enumerate(pieces):
            if what == "cut" and number > luck.randint(0, 3):
                pieces.close()


# --- killing it ---


@dataclass
class Told:
    """What a killed process had said, and the phase it was in."""

    phase: str
    out: str
    err: str


def killed(command: list[str], marks: Marks, target: str, luck: random.Random, asks: str) -> Told:
    """Start a process and kill it at a random moment near one of its phases."""
    folder = Path(os.environ["MLX_STREAM_HOME"]).parent
    out, err, into = (folder / name for name in ("out", "err", "in"))
    into.write_text(asks, encoding="utf-8")
    visit = 1 if target == "opening" else luck.randint(1, 9)
    with into.open() as stdin, out.open("w") as stdout, err.open("w") as stderr:
        process = subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr)
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


# --- looking at what is left ---


@dataclass
class Kills:
    """Sessions of one home, killed again and again; what they must hold."""

    model: Model
    folder: Path
    luck: random.Random
    said: dict[str, list[Exchange]] = field(default_factory=dict)
    fell: Counter[str] = field(default_factory=Counter)
    committed: int = 0
    reread: int = 0

    @property
    def home(self) -> Path:
        return Path(os.environ["MLX_STREAM_HOME"])

    def kill(self, number: int) -> str:
        """Kill once and look at what is left; return a line for a log."""
        target = ("snapshot", "commit", "reply", "snapshot", "commit", "opening")[number % 6]
        name = "long" if number % 3 else f"s{number // 9}"
        path = self.home.parent / "marks"
        path.write_bytes(b"")
        if number % 5 == 4:
            told = self._kill_program(name, target, Marks(path))
        else:
            told = self._kill_talk(name, target, Marks(path))
        self.fell[told.phase] += 1
        self.look(name)
        return f"{number}: {name}, near {target}, in {told.phase}; {len(self.said[name])} exchanges"

    def _kill_talk(self, name: str, target: str, marks: Marks) -> Told:
        seed = self.luck.randrange(2**32)
        words = (self.folder, name, seed, self.home.parent / "marks")
        command = [sys.executable, "-m", "tests.fakes.killed_chat", "talk", *map(str, words)]
        told = killed(command, marks, target, self.luck, "")
        possible = [self.said.get(name, [])]
        for line in told.out.splitlines(keepends=True):
            if line.endswith("\n"):
                possible = after(possible[0], json.loads(line))
                self.committed += "did" in line
        self.said[name] = self.found(name, possible)
        return told

    def _kill_program(self, name: str, target: str, marks: Marks) -> Told:
        questions = [ask(self.luck) for _ in range(300)]
        options = {"system": OPTIONS.system, "window": WINDOW, "max-tokens": LONGEST_REPLY}
        words = [self.home.parent / "marks", "chat", self.folder, "--stats", f"--session={name}"]
        words += [f"--{option}={value}" for option, value in options.items()]
        command = [sys.executable, "-m", "tests.fakes.killed_chat", "program", *map(str, words)]
        told = killed(command, marks, target, self.luck, "\n".join(questions))
        before, done = self.said.get(name, []), told.err.count("\n[") + told.err.startswith("[")
        now = self.stored(name)
        new = now[len(before) :]
        assert now[: len(before)] == before
        assert [e.question for e in new] == questions[: len(new)]
        assert len(new) in (done, done + 1), f"{done} of {len(new)} were said to be done"
        assert told.out.startswith("".join(f"{e.reply}\n" for e in new[:done]))
        self.committed += done
        self.said[name] = now
        return told

    def stored(self, name: str) -> list[Exchange]:
        """Return what a transcript holds, of a copy: what goes on is what was killed."""
        with self.copied():
            database = session_paths(name).database
            if not database.exists():
                return []
            with Store.open(database) as store:
                return store.exchanges()

    def found(self, name: str, possible: list[list[Exchange]]) -> list[Exchange]:
        """Return what a transcript holds, which is one of what it may hold."""
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
        """See that a session verifies, opens, holds what was said, and goes on."""
        assert len(left_over(self.home, name)) <= 2, left_over(self.home, name)
        with self.copied() as copy:
            if session_paths(name).database.exists():
                manage.verify_session(name)
            notices: list[str] = []
            conversation = open_session(name, self.model, OPTIONS, notices.append)
            again = [notice for notice in notices if "again" in notice]
            assert all(any(reason in line for reason in HARMLESS) for line in again), again
            self.reread += len(again)
            check_attended(conversation, self.said[name])
            assert conversation.saved
            store = conversation.saved.store
            assert len(conversation.chat.exchanges) <= store.count + 1 - store.progress.first
            for _ in conversation.reply("Still there?"):
                pass
            now = store.exchanges()
            assert now == [*self.said[name], conversation.last]
            check_attended(conversation, now)
            conversation.close()
            assert "snapshot after exchange" in manage.verify_session(name)
            assert left_over(copy, name) == []

    def end(self) -> None:
        """Close every session properly: nothing of all the kills is left."""
        for name in self.said:
            open_session(name, self.model, OPTIONS).close()
            assert left_over(self.home, name) == [], name


def left_over(home: Path, name: str) -> list[str]:
    """Return what is there of a session beside its own files."""
    own = {f"{name}.{end}" for end in ("db", "db-wal", "db-shm", "lock", "safetensors")}
    own.add(f"{name}.safetensors.unusable")
    found = [
        path.name for path in home.glob("s*/*") if path.name.lstrip(".").startswith(f"{name}.")
    ]
    return [each for each in found if each not in own]


def after(said: list[Exchange], told: dict[str, Any]) -> list[list[Exchange]]:
    """Return what a transcript may hold after a line of a process; what is certain first."""
    if "will" in told:
        what, blank = told["will"], Exchange(told["question"], "", (), (), ())
        if what in ("reply", "cut"):
            return [said, [*said, blank]]
        if what == "retry":
            return [said, [*said[:-1], Exchange(said[-1].question, "", (), (), ())]]
        return [said, said[:-1], *([[*said[:-1], blank]] if what == "edit" else [])]
    if told["did"] in ("undo", "clear"):
        return [said[:-1] if told["did"] == "undo" else said]
    values: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in told["exchange"].items()
    }
    kept = said[:-1] if told["did"] in ("retry", "edit") else said
    return [[*kept, Exchange(**values)]]


def same(now: list[Exchange], wanted: list[Exchange]) -> bool:
    """Return whether a transcript is as it must be; of an exchange cut short only its question."""
    if len(now) != len(wanted) or now[:-1] != wanted[:-1]:
        return False
    return now == wanted or (
        not wanted[-1].question_ids and now[-1].question == wanted[-1].question
    )


def check_attended(conversation: Conversation, said: list[Exchange]) -> None:
    """See that a stream attends to its pinned beginning and to the end of what was said."""
    chat = conversation.chat
    held, pinned = chat.exchanges, list(chat.prompts.pinned)
    assert [(e.question, e.reply) for e in held] == [
        (e.question, e.reply) for e in said[len(said) - len(held) :]
    ]
    ids = [id for n, e in enumerate(held) for id in ((e.closing_ids if n else ()) + read(e))]
    ids = ids[: len(ids) - len(chat.conversation_state().pending.ids)]
    attended = chat.tokens.attended_ids()
    assert attended[: len(pinned)] == pinned[: len(attended)]
    # Sinks beyond the pinned ones may be of an exchange that has left.
    ring = attended[chat.cache.geometry.sinks :]
    assert ring == ids[len(ids) - len(ring) :], "what is attended is not what was said"


def read(exchange: Exchange) -> tuple[int, ...]:
    return exchange.question_ids + exchange.reply_ids


def main() -> None:
    """Be the process that is killed: `talk FOLDER NAME SEED MARKS`, or `program MARKS ARG...`."""
    kind, *words = sys.argv[1:]
    prepare(Marks(Path(words[0] if kind == "program" else words[3])))
    if kind == "talk":
        talk(Path(words[0]), words[1], int(words[2]))
    else:
        from mlx_stream.cli import main

        sys.argv[1:] = words[1:]
        main()


if __name__ == "__main__":
    main()
