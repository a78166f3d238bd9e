"""Send signals to `mlx_stream chat` at random moments, and inspect what is left each time.

    python -m tests.long.signals [--moments 100] [--seed 1]

The moments fall within reading, thinking, replying, saving and leaving. Each of SIGHUP, SIGTERM
and SIGINT comes alone at that many of them, and then with a second signal a little later. After one
signal the exit status, the transcript and the stream's state must be right. After two, nothing that
was on disk may be lost. Prints a line for each moment and one of JSON at the end; exits with 1 at
the first failure. Takes an hour: not collected by pytest.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import mlx_stream  # noqa: F401  # isort: skip  # first: it loads OpenBLAS ahead of MLX

from mlx_stream import cli
from mlx_stream.chat import manage, saving
from mlx_stream.chat.resume import SessionOptions, open_session
from mlx_stream.chat.schema import ASKED
from mlx_stream.chat.session import ChatSession
from mlx_stream.chat.session_files import session_paths
from mlx_stream.chat.store import Store
from mlx_stream.generate import snapshot
from mlx_stream.generate.model import Model
from mlx_stream.load import load
from mlx_stream.text.pieces import Piece
from tests.chat.test_settle import THINKS
from tests.fakes.killed_chat import DEADLINE, Marks, check_attended, turns_of
from tests.fakes.thinkers import write_thinker

SIGNALS = signal.SIGHUP, signal.SIGTERM, signal.SIGINT
# How often a phase is entered before the signal comes. The first commit creates the session.
VISITS = {
    "reading": range(1, 7),
    "thinking": range(1, 91),
    "reply": range(1, 201),
    "commit": range(2, 10),
    "snapshot": range(1, 6),
    "closing": range(1, 2),
}
LONGEST_DELAY = 0.006
WINDOW = 400
OPTIONS = ("--temp", "0", "--window", str(WINDOW), "--max-tokens", "60")
QUESTIONS = [f"{number} {'the man and ' * (number % 4 * 60)}?" for number in range(40)]
# The model thinks in capital letters, and then answers for as long as it may.
SCRIPT = ("<think>", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ", "</think>", *"jklmnop", "j")


def mark_turns(marks: Marks) -> None:
    """Mark whether a turn is reading, thinking or replying."""
    steps_of = ChatSession._turn_steps

    def marked(*args: Any) -> Any:
        steps, phase, result = steps_of(*args), "reading", None
        try:
            while True:
                with marks.within(phase):
                    item = steps.send(result)
                    result = yield item
                if isinstance(item, Piece):
                    phase = "thinking" if item.thinking else "reply"
        except StopIteration:
            return
        finally:
            steps.close()

    setattr(ChatSession, "_turn_steps", marked)  # noqa: B010


def chat(marks: Marks) -> None:
    """Run the program that receives signals."""
    saving.SECONDS_BETWEEN_SNAPSHOTS = -1
    marks.mark(snapshot, "save_snapshot", "snapshot")
    marks.mark(Store, "write", "commit")
    marks.mark(saving.SavedSession, "close", "closing")
    mark_turns(marks)
    cli.main()


class Moments:
    """Chats that signals end, each in its own session."""

    def __init__(self, place: Path, luck: random.Random):
        self.place, self.luck, self.number = place, luck, 0
        self.folder = write_thinker(
            place / "model", THINKS["is told to think"], SCRIPT, eos="<|im_end|>"
        )
        self.model: Model = load(self.folder, dtype="float32", keep_quantized=False)
        self.fell: Counter[str] = Counter()
        self.statuses: Counter[str] = Counter()

    def moment(self, first: int, second: int | None) -> str:
        """Run one chat until its signal or signals arrive, and inspect what is left."""
        self.number += 1
        name, target = f"s{self.number}", [*VISITS][self.number % len(VISITS)]
        questions = QUESTIONS[: self.luck.randint(1, 3) if target == "closing" else None]
        phase, code, out, err = self.run(name, target, questions, first, second)
        self.fell[phase] += 1
        self.statuses[str(code)] += 1
        # Python prints a traceback if both come during one call into MLX, or one comes at exit.
        at_once = second and "ignored due to race condition" in err
        late = out.count("\n") >= len(questions) and "atexit callback" in err
        assert at_once or late or ("Traceback" not in err and "Exception" not in err), err
        # Two that come during the same call into MLX may swap places.
        expected = {128 + first, 128 + second, -second} if second else {128 + first}
        if out.count("\n") >= len(questions):  # all are answered, so it may be about to exit
            expected |= {-first, 0}
        assert code in expected, f"{target}, in {phase}: ended with {code}: {err}"
        left = self.look(name, questions, out, alone=not second)
        return f"{self.number}: {first}, {second}, in {phase} near {target}: {code}; {left}"

    def run(
        self, name: str, target: str, questions: list[str], first: int, second: int | None
    ) -> tuple[str, int, str, str]:
        """Return the phase in which the signal came, the status, and what was written."""
        path, out, err = (self.place / one for one in ("marks", "out", "err"))
        path.write_bytes(b"")
        marks = Marks(path)
        command = [sys.executable, "-m", "tests.long.signals", "--be", str(path)]
        command += ["chat", str(self.folder), "--session", name, *OPTIONS]
        asked = self.place / "questions"
        asked.write_text("\n".join(questions))
        with asked.open() as stdin, out.open("w") as stdout, err.open("w") as stderr:
            process = subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr)
            visit, until = self.luck.choice(VISITS[target]), time.monotonic() + DEADLINE
            while marks.entered(target) < visit:
                assert time.monotonic() < until and process.poll() is None, err.read_text()
                time.sleep(0.0005)
            time.sleep(self.luck.uniform(0, LONGEST_DELAY))
            phase = marks.phase
            process.send_signal(first)
            if second:
                time.sleep(self.luck.uniform(0, 3 * LONGEST_DELAY))
                process.send_signal(second)
            return phase, process.wait(DEADLINE), out.read_text(), err.read_text()

    def look(self, name: str, questions: list[str], out: str, alone: bool) -> str:
        """Check what is saved, and that the session opens and continues."""
        with Store.open(session_paths(name).database) as store:
            found = turns_of(store.turns())
        assert [question for _, question, _ in found] == [one.strip() for one in questions][
            : len(found)
        ]
        assert all(state != ASKED for state, *_ in found[:-1])
        replies = [exchange.reply if exchange else "" for _, _, exchange in found]
        *whole, last = out.split("\n")
        for text, (_, _, exchange) in zip(whole, found, strict=False):
            # A signal can come after a piece has been taken but before it is printed.
            cut = exchange and exchange.finish == "interrupted" and exchange.reply.startswith(text)
            assert cut or (exchange and exchange.reply == text), (replies, whole)
        assert len(whole) <= len(found)
        assert not alone or [*replies, ""][len(whole)].startswith(last), (replies, last)
        answered = sum(state != ASKED for state, *_ in found)
        verified = manage.verify_session(name)
        if alone and answered:
            assert verified.endswith(f"snapshot after exchange {answered:,}"), verified
        notices: list[str] = []
        saved = open_session(name, self.model, SessionOptions(window=WINDOW), notices.append)
        if alone and answered:
            assert not any("read" in notice for notice in notices), notices
        check_attended(saved.chat, found)
        for _ in saved.chat.reply("Still there?", max_tokens=3):
            pass
        saved.close()
        return f"{answered} of {len(found)} answered"


def main() -> int:
    if sys.argv[1:2] == ["--be"]:
        marks = Marks(Path(sys.argv[2]))
        del sys.argv[1:3]
        chat(marks)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=100)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    started, luck = time.monotonic(), random.Random(given.seed)
    with tempfile.TemporaryDirectory() as place:
        os.environ["MLX_STREAM_HOME"] = str(Path(place) / "home")
        moments = Moments(Path(place), luck)
        for twice in (False, True):
            for first in SIGNALS:
                for _ in range(given.moments):
                    second = luck.choice(SIGNALS) if twice else None
                    print(moments.moment(first, second), flush=True)
    measured = {
        "seed": given.seed,
        "chats": moments.number,
        "fell_in": dict(moments.fell),
        "statuses": dict(moments.statuses),
        "seconds": round(time.monotonic() - started),
    }
    print(json.dumps(measured))
    return int(not all(moments.fell[phase] for phase in VISITS))


if __name__ == "__main__":
    sys.exit(main())
