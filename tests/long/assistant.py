"""Kills an assistant with SIGKILL while it follows a growing file; prints what was found.

    python -m tests.long.assistant northanger_abbey.txt pride_and_prejudice.txt --home work

All its files are in `--home`; run again with the same arguments, it continues where it stopped.
"""

import argparse
import json
import os
import random
import signal
import sys
import threading
import time
import zlib
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx_stream  # noqa: F401  # isort: skip  # first: it loads OpenBLAS ahead of MLX

from mlx_stream.chat.prompts import PromptBuilder
from mlx_stream.engine.incremental_encoder import IncrementalEncoder
from mlx_stream.hub.resolve import resolve
from mlx_stream.load import read_checkpoint
from mlx_stream.text.tokenizer import Tokenizer
from mlx_stream_assistant.errors import AssistantError
from mlx_stream_assistant.journal import Journal
from mlx_stream_assistant.paths import assistant_paths
from mlx_stream_assistant.settings import SYSTEM
from tests.fakes.assistants import Running, Watch, asked, entries, has_caught_up

TICK, SAMPLE = 0.25, 5.0
# Seconds after a start in which resident memory may still grow. It may also grow until the first
# answer: by then everything has run once, and the memory of a ring's copy is kept for reuse.
WARM_UP = 60.0
FLAT = 10e6
MOST_IDLE = 1.0  # percent of one core
QUESTION = "With whom were Darcy and Elizabeth always on the most intimate terms?"


@dataclass
class Progress:
    """What a stopped run must know to continue."""

    seconds: float = 0.0
    kills: list[dict[str, Any]] = field(default_factory=list)
    samples: list[list[float]] = field(default_factory=list)  # process, seconds up, resident bytes


class Experiment:
    """One assistant, the file it follows, and what was observed about both."""

    def __init__(self, text: bytes, options: argparse.Namespace):
        self.text, self.options = text, options
        self.home = options.home.absolute()
        self.home.mkdir(parents=True, exist_ok=True)
        self.followed, self.diary = self.home / "novels.txt", self.home / "diary.md"
        self.followed.touch()
        self.model = resolve(options.model, print)
        os.environ["MLX_STREAM_HOME"] = str(self.home / "mlx_stream")
        self.progress = Progress()
        self._kept = self.home / "progress.json"
        if self._kept.exists():
            self.progress = Progress(**json.loads(self._kept.read_text(encoding="utf-8")))
        self.watch = Watch(assistant_paths("main").journal, self.home / "chunks.jsonl")
        luck = random.Random(options.seed)
        self.kills = sorted(luck.randrange(len(text)) for _ in range(options.kills))
        self.luck = random.Random()
        self._asked = self._answered = 0  # the processes that were asked; those that have answered
        self.assistant = self.started()

    def started(self) -> Running:
        options = self.options
        words = (
            f"--model={self.model}",
            f"--window={options.window}",
            f"--follow={self.followed}",
            f"--notes={self.diary}",
            f"--every={options.every}",
            f"--snapshot-every={options.snapshot_every}",
        )
        return Running(words, self.home / "said.log")

    def run(self) -> None:
        """Write the text at its pace, kill the assistant at the chosen moments, and wait.

        The wait ends when everything has been read.
        """
        begun, before, sampled = time.monotonic(), self.progress.seconds, 0.0
        while not self.has_read_all():
            time.sleep(TICK)
            self.progress.seconds = before + time.monotonic() - begun
            self.write()
            self.watch.look()
            if time.monotonic() - sampled >= SAMPLE:
                sampled = time.monotonic()
                self.sample()
            done = len(self.progress.kills)
            if done < len(self.kills) and self.followed.stat().st_size >= self.kills[done]:
                self.kill()
            assert self.assistant.process.poll() is None, self.assistant.said

    def write(self) -> None:
        """Append what is due."""
        size, pace = self.followed.stat().st_size, 60 * self.options.minutes
        due = len(self.text) * min(1.0, self.progress.seconds / pace if pace else 1.0)
        with self.followed.open("ab") as file:
            file.write(self.text[size : round(due)])

    def kill(self) -> None:
        """Kill the assistant at a random moment, and start it again."""
        until = time.monotonic() + self.luck.uniform(0, 5)
        while time.monotonic() < until:
            time.sleep(TICK / 5)
            self.watch.look()
        status = self.status()
        self.assistant.kill()
        self.watch.look()
        waiting = {k: status.get(k) for k in ("bytes_read", "chunks_fed", "chunks_saved")}
        self.progress.kills.append({"at": round(self.progress.seconds), **waiting})
        print(f"killed: {self.progress.kills[-1]}", flush=True)
        self.assistant = self.started()
        self.keep()

    def sample(self) -> None:
        if (status := self.status()) and "attended" in status:
            if status["pid"] != self._asked:
                self._asked = status["pid"]
                threading.Thread(target=self.ask, args=(status["pid"],), daemon=True).start()
            if status["pid"] == self._answered:
                row = [status["pid"], status["uptime_seconds"], status["resident_bytes"]]
                self.progress.samples.append(row)
                self.keep()
            print(
                f"{self.progress.seconds:6.0f} s  {status['bytes_read']:>9,} of "
                f"{len(self.text):,} bytes  {status['evicted']:>9,} evicted  "
                f"{status['chunks_waiting']:>3} waiting  {status['resident_bytes'] / 1e6:.1f} MB",
                flush=True,
            )

    def ask(self, process: int) -> None:
        with suppress(AssistantError):  # it may be killed in the meantime
            asked("ask", question=self.options.question)
            self._answered = process

    def status(self) -> dict[str, Any]:
        try:
            return asked("status")
        except AssistantError:
            return {}

    def has_read_all(self) -> bool:
        status = self.status()
        return status.get("bytes_read") == len(self.text) and has_caught_up(status)

    def keep(self) -> None:
        written = self._kept.with_suffix(".new")
        written.write_text(json.dumps(asdict(self.progress)), encoding="utf-8")
        written.replace(self._kept)

    # --- what was found ---

    def report(self) -> bool:
        """Inspect everything, print a table, and return whether all of it is correct."""
        status = self.status()
        answer = asked("ask", question=self.options.question)["text"].strip()
        note = asked("note")["note"]
        idle = self.idle_cpu() if self.options.idle else None
        stopped = self.assistant.stop()
        self.watch.look()
        with closing(Journal(assistant_paths("main").journal)) as journal:
            source = journal.source(str(self.followed))
        written = self.followed.read_bytes()
        count, crc = len(written), zlib.crc32(written)
        tokens, read = self.tokens(), status["attended"] + status["evicted"]
        total, checksum = (source.bytes, source.crc) if source else (0, 0)
        kills = len(self.progress.kills)
        whole = self.watch.text(self.followed).encode() == written
        rows = [
            ("bytes written", f"{count:,}", written == self.text),
            ("bytes in the journal", f"{total:,}", total == count),
            ("their checksum, the file's", f"{checksum:08x}, {crc:08x}", checksum == crc),
            ("chunks, joined", f"{len(self.watch.chunks):,}, the file's text", whole),
            ("tokens of it, in the stream", f"{tokens:,}, {read:,}", tokens == read),
            ("kills", f"{kills} of {self.options.kills}", kills == self.options.kills),
        ]
        for process, (low, high, samples) in self.memory().items():
            shown = f"{low / 1e6:.1f} to {high / 1e6:.1f} MB, {samples} samples after warm-up"
            rows.append((f"resident, process {process}", shown, high - low <= FLAT))
        rows.append(("notes", f"{len(entries(self.diary))}, nothing else in the file", True))
        if idle is not None:
            rows.append(("CPU in an idle minute", f"{idle:.2f} %", idle < MOST_IDLE))
        rows.append(("seconds from SIGTERM to its end", f"{stopped:.2f}", stopped < 1.0))
        rows.append(("question", self.options.question, True))
        rows.append(
            (
                "answer",
                " ".join(answer.split())[:300],
                self.options.expect.lower() in answer.lower(),
            )
        )
        print(f"\nthe last note:\n\n{note or entries(self.diary)[-1]}")
        for what, shown, ok in rows:
            print(f"{'ok ' if ok else 'NOT'}  {what:<34} {shown}")
        return all(ok for *_, ok in rows)

    def tokens(self) -> int:
        """Return how many tokens an uninterrupted stream has after being fed the same text."""
        tokenizer = Tokenizer.from_checkpoint(read_checkpoint(Path(self.model)))
        assert tokenizer.template
        turns = PromptBuilder(tokenizer, tokenizer.template, SYSTEM, pin=True)
        turn = turns.open_turn()
        words = IncrementalEncoder(turns, turn.opening, turn.lead)
        before = len(turns.encode(turn.opening))
        return before + sum(len(words.add(text)) for text in self.watch.fed)

    def memory(self) -> dict[int, tuple[float, float, int]]:
        """Return each process's minimum and maximum resident memory after warming up."""
        found: dict[int, list[float]] = {}
        for process, seconds, resident in self.progress.samples:
            if seconds >= WARM_UP:
                found.setdefault(int(process), []).append(resident)
        return {process: (min(s), max(s), len(s)) for process, s in found.items()}

    def idle_cpu(self) -> float | None:
        """Return the percentage of one core that it uses in a minute without new text."""
        clock = Path(f"/proc/{self.assistant.process.pid}/stat")
        if not clock.exists():
            return None
        before = cpu_seconds(clock)
        time.sleep(60)
        return 100 * (cpu_seconds(clock) - before) / 60


def cpu_seconds(clock: Path) -> float:
    """Return a process's processor time, in user and kernel mode, as Linux counts it."""
    fields = clock.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description="See the top of this file.")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--home", type=Path, required=True, help="everything it makes is there")
    parser.add_argument("--bytes", type=int, help="the last so many of the text")
    parser.add_argument("--minutes", type=float, default=30.0, help="in which the file grows")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--window", type=int, default=252)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--every", type=float, default=5.0, help="minutes between notes")
    parser.add_argument("--snapshot-every", type=float, default=0.5, help="minutes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--question", default=QUESTION)
    # "Gardiners"; the starter, in 4 bits, knows the name and misspells its end at times.
    parser.add_argument("--expect", default="Gardin", help="what its answer must hold")
    parser.add_argument("--idle", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    text = b"\n\n".join(path.read_bytes() for path in options.files)
    if options.bytes:
        text = text[-options.bytes :].decode("utf-8", "ignore").encode()
    experiment = Experiment(text, options)
    try:
        experiment.run()
        ok = experiment.report()
    finally:
        experiment.keep()
        if experiment.assistant.process.poll() is None:
            experiment.assistant.process.send_signal(signal.SIGTERM)
            experiment.assistant.process.wait()
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
