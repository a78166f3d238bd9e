"""Let many sessions of one engine talk, listen, be cut, copied, closed and forgotten at random.

    python -m tests.long.engine [--minutes 10] [--sessions 50] [--seed 0]

The model is tiny. Half of the sessions share steps, and now and then a step fails as if the
device were lost. Afterwards single sessions repeat all conversations, one after another, and
the replies must be the same, id by id. A stream that listened must attend to what it was fed and
nothing else, whenever it is inspected. Prints one line of JSON; exits with 1 if a reply did not
end, something belonged to another session, or memory grew.
"""

import argparse
import ctypes
import faulthandler
import gc
import json
import pydoc_data.topics
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import mlx_stream  # isort: skip  # first: it loads OpenBLAS ahead of MLX

import mlx.core as mx

from mlx_stream import errors
from mlx_stream.backend import resident_bytes
from mlx_stream.chat.exchange import Exchange
from tests.fakes.conversations import pieces_of
from tests.fakes.engines import GREEDY, engine_of
from tests.fakes.failing import failing
from tests.fakes.shell import SMALL
from tests.fakes.tiny import tiny_config, write_letters

OPTIONS = {"window": 90, "max_tokens": 40, "sampling": GREEDY}
TEXT = pydoc_data.topics.topics["compound"]
PATIENCE = 120.0  # seconds for one request
RESIDENT_GROWTH = 8_000_000
ACTIVE_GROWTH = 32_768
OBJECT_GROWTH = 2_000
LISTENERS = 5  # one in this many sessions listens
STEPS_UNTIL_FAILURE = 700  # on average
QUESTIONS = ("Go on.", "And the man of the house?", "x", "What is it in the end? " * 12)


@dataclass
class Life:
    """What was done in one conversation, and the ids of the replies: a script to replay."""

    seed: int
    system: str | None = None
    turns: list[tuple[str, str, int, bool]] = field(default_factory=list)
    replies: list[tuple[int, ...]] = field(default_factory=list)


class Worker:
    """One thread that uses sessions one after another."""

    def __init__(self, engine: mlx_stream.Engine, number: int, seed: int, until: float):
        self.engine, self.number, self.until = engine, number, until
        self.random = random.Random(f"{seed} {number}")
        self.done: Counter[str] = Counter()
        self.lives: list[Life] = []
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        listens = self.number % LISTENERS == 0
        try:
            while time.monotonic() < self.until:
                self.listen() if listens else self.talk()
        except BaseException as error:
            self.failure = error

    def patiently(self, ask: Callable[[], Any]) -> Any:
        """Ask until the queue accepts the request."""
        while True:
            try:
                return ask()
            except errors.QueueFull:
                self.done["queue full"] += 1
                time.sleep(self.random.random() / 5)

    def talk(self) -> None:
        """Hold one conversation."""
        options = {**OPTIONS, "shared": self.number % 2 == 0}
        if self.random.random() < 0.5:
            options["system"] = "You are brief."
        chat = self.patiently(lambda: self.engine.session(**options))
        life = Life(self.number, options.get("system"))
        for _ in range(self.random.randint(1, 12)):
            acts = ("reply", "cut", "retry", "edit", "undo", "fork")
            act = self.random.choices(acts, (50, 30, 8, 6, 6, 6))[0]
            if act != "reply" and act != "cut" and not life.turns:
                continue
            question = f"{self.number}: {self.random.choice(QUESTIONS)}"
            self.done[act] += 1
            try:
                if act == "fork":
                    chat = self.fork(chat, life)
                elif not self.turn(chat, life, act, question):
                    break
            except errors.ComputeError:  # what was said before it is checked
                self.done["failed steps"] += 1
                break
            if time.monotonic() > self.until:
                break
        if self.random.random() < 0.3:  # in the middle of a reply
            self.done["closed in a reply"] += 1
            long = {"max_tokens": 100_000}
            with suppress(errors.ComputeError):
                _pieces, _ = self.patiently(
                    lambda: begun(chat.reply("Never read to its end", **long))
                )
        if self.random.random() < 0.2:
            self.done["closed by a callback"] += 1
            self.patiently(chat.clear).add_done_callback(lambda _: chat.close())
        elif self.random.random() < 0.5:
            self.done["closed"] += 1
            chat.close(0 if self.random.random() < 0.5 else PATIENCE)
        else:
            self.done["forgotten"] += 1
        if len(self.lives) < 20:
            self.lives.append(life)

    def fork(self, chat: Any, life: Life) -> Any:
        """Return a copy that continues the conversation; the original is forgotten."""
        back = self.random.randint(0, 1)
        copy = self.patiently(lambda: chat.fork(back))
        try:
            self.patiently(lambda: copy._future(last_exchange)).result(PATIENCE)
        except errors.ValueRefused:  # everything is evicted
            return chat
        life.turns.append(("fork", "", back, False))
        return copy

    def turn(self, chat: Any, life: Life, act: str, question: str) -> bool:
        """Do one thing and record the result; return whether the conversation can continue."""
        cut = act == "cut"
        if act == "undo":
            try:
                self.patiently(chat.undo).result(PATIENCE)
                life.turns.append((act, "", 0, False))
            except errors.ValueRefused:  # everything is evicted
                pass
            return True
        try:
            pieces, first = self.patiently(lambda: begun(pieces_of(chat, act, question)))
            if first:
                list(islice(pieces, self.random.randint(0, 6) if cut else None))
            pieces.close()
        except errors.ValueRefused:  # no attended question can be answered again
            return True
        last = self.patiently(lambda: chat._future(last_exchange)).result(PATIENCE)
        if last is None:  # the turn was longer than the window and is already evicted
            return False
        life.turns.append((act, question, len(last.reply_ids), last.finish == "interrupted"))
        life.replies.append(last.reply_ids)
        return bool(last.reply_ids)

    def listen(self) -> None:
        """Feed one stream, ask it a question, and check that it contains what was fed."""
        with suppress(errors.ComputeError):  # it is not used after a step that failed
            self._listen()

    def _listen(self) -> None:
        listener = self.patiently(
            lambda: self.engine.listen(window=90, max_tokens=20, sampling=GREEDY)
        )
        mine, fed = f"{self.number} ", ""
        for _ in range(self.random.randint(1, 10)):
            at = self.random.randrange(len(TEXT) - 500)
            text = f" {mine}{TEXT[at : at + self.random.randint(1, 500)]}"
            listener.feed(text, timeout=PATIENCE)
            fed += text
            self.done["fed"] += 1
            if self.random.random() < 0.4:
                pieces, _ = self.patiently(
                    lambda: begun(listener.ask(f"{mine}What?", remember=False))
                )
                list(islice(pieces, self.random.choice((0, 1, None))))
                pieces.close()
                self.done["asked aside"] += 1
        if self.random.random() < 0.3:
            self.done["closed while reading"] += 1
            return listener.close()
        self.patiently(lambda: listener.flush(PATIENCE))
        heard = listener._listener_worker.current()
        ids = [*heard.pinned, *heard.prompts.encode(heard.prompts.escape_special_tokens(fed))]
        wanted = ids[: heard.cache.geometry.sinks] + ids[heard.cache.oldest :]
        attended = heard.tokens.ids.attended()
        # The first word may be split differently when it is encoded without the header before it.
        assert len(ids) == heard.tokens.length and attended == wanted, "another's text"
        self.done["heard as fed"] += 1
        pieces, _ = self.patiently(lambda: begun(listener.ask(f"{mine}What?")))
        pieces.close()
        listener.close()


def last_exchange(chat: mlx_stream.ChatSession) -> Exchange | None:
    return next(reversed(chat.exchanges), None)


def begun(pieces: Any) -> tuple[Any, Any]:
    """Return a reply and its first piece; a refused reply is over, and must be requested again."""
    return pieces, next(pieces, None)


def again(model: mlx_stream.Model, life: Life) -> None:
    """Repeat everything in a session that runs alone."""
    chat = mlx_stream.ChatSession(model, system=life.system, **OPTIONS)
    replies = iter(life.replies)
    for act, question, count, cut in life.turns:
        if act == "undo":
            chat.undo()
            continue
        if act == "fork":  # not just undone: a copy has no rows that were not attended to
            chat = chat.fork(count)
            continue
        wanted = next(replies)
        if not wanted:  # cut at an unknown point while the question was read
            return
        pieces = pieces_of(chat, act, question)
        list(islice(pieces, count if cut else None))
        pieces.close()
        assert chat.exchanges[-1].reply_ids == wanted, f"not what it says alone: {act} {question}"


def rings(engine: mlx_stream.Engine) -> int:
    """Return the bytes of weights and rings, without the beginnings that are kept."""
    return engine.memory[0] - engine._host.prefix_bytes


def fail_sometimes(engine: mlx_stream.Engine, rng: random.Random) -> None:
    """Make a step fail now and then."""
    scheduler, network = engine._worker._scheduler, engine._host.model.network
    run = scheduler.run

    def run_or_fail(requests: Any, measure: bool) -> Any:
        if rng.random() > 1 / STEPS_UNTIL_FAILURE:
            return run(requests, measure)
        with failing(network):
            return run(requests, measure)

    scheduler.run = run_or_fail  # type: ignore[method-assign]


def look() -> dict[str, int]:
    """Return what remains when every session is closed.

    glibc keeps what 50 threads freed, some 150 MB, in as many arenas, and the amount varies, so it
    is released first. (With MALLOC_ARENA_MAX=1 nothing varies, with or without this.)
    """
    gc.collect()
    gc.collect()
    with suppress(AttributeError, OSError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return {
        "active": mx.get_active_memory(),
        "resident": resident_bytes(),
        "objects": len(gc.get_objects()),
        "threads": threading.active_count(),
    }


def run(folder: Path, minutes: float, sessions: int, seed: int) -> dict[str, Any]:
    """Run the engine for `minutes`, then check it; return what was found."""
    # On the thread that used it first, MLX 0.32.4 raises the error of a CPU task while it queues
    # others. One that is counted but not queued is waited for forever, so that thread must not be
    # the engine's.
    mx.eval(mx.zeros(1))
    engine = engine_of(folder, queue_size=max(2, sessions * 3 // 4))
    engine.wait(PATIENCE)
    weights = engine.memory[0]
    fail_sometimes(engine, random.Random(seed))
    looks, failures, lives = [], [], []
    done: Counter[str] = Counter()
    rounds = 4  # no session is open between two rounds
    for number in range(rounds):
        until = time.monotonic() + 60 * minutes / rounds
        workers = [Worker(engine, n, seed + 1_000 * number, until) for n in range(sessions)]
        for worker in workers:
            worker.thread.start()
        for worker in workers:
            worker.thread.join(PATIENCE + 60 * minutes / rounds)
            if worker.thread.is_alive():
                faulthandler.dump_traceback()
                failures.append(f"worker {worker.number} hangs")
            if worker.failure:
                failures.append(repr(worker.failure))
            done += worker.done
            lives += worker.lives
        if failures:
            break
        lives = random.Random(seed).sample(lives, min(len(lives), 200))
        workers = worker = None  # nothing keeps what was forgotten
        gc.collect()
        waited = time.monotonic() + PATIENCE
        while rings(engine) > weights and time.monotonic() < waited:
            time.sleep(0.01)
        if rings(engine) > weights:
            failures.append(f"{rings(engine) - weights:,} bytes are still allocated")
        looks.append(look())
    closed = engine.close(PATIENCE)
    alone = mlx_stream.load(folder, dtype="float32", keep_quantized=False)
    until, checked = time.monotonic() + max(5.0, 15 * minutes), 0
    for life in lives:
        if time.monotonic() < until and not failures:
            try:
                again(alone, life)
                checked += 1
            except AssertionError as error:
                failures.append(str(error))
    # The first half is a warm-up: the malloc arenas of 50 threads were seen to grow for that long.
    warm = looks[len(looks) // 2 - 1] if looks else {}
    grown = {name: looks[-1][name] - value for name, value in warm.items()}
    return {
        "minutes": minutes,
        "sessions": sessions,
        "done": dict(done),
        "conversations_said_again": checked,
        "looks": looks,
        "grown": grown,
        "failures": failures,
        "good": closed
        and not failures
        and checked > 0
        and grown["active"] <= ACTIVE_GROWTH
        and grown["resident"] <= RESIDENT_GROWTH
        and grown["objects"] <= OBJECT_GROWTH
        and grown["threads"] <= 0,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--sessions", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = write_letters(Path(folder), tiny_config(**SMALL))
        found = run(path, chosen.minutes, chosen.sessions, chosen.seed)
    print(json.dumps(found))
    return 0 if found["good"] else 1


if __name__ == "__main__":
    sys.exit(main())
