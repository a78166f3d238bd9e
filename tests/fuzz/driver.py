"""Opens hostile files by number, in a process that may crash, hang or grow; independent of formats.

    python -m tests.fuzz.checkpoints --count 3000 --seed 1
    python -m tests.fuzz.sessions --count 1000 --seed 1

A module in this folder says what is fuzzed. It sets the SECONDS of processor time and the bytes of
GROWTH allowed for one file. Its `prepare(place)` writes the files to alter. Its `start(place)`
returns a function that takes random numbers, alters a file, and returns what it altered and another
function, which opens the file and returns an outcome and a line. Anything else is a BUG. The exit
status is 1 if there was one, and the number that recreates the file is printed.
"""

import argparse
import importlib
import json
import os
import random
import resource
import select
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

WALL = 60.0  # the limit for a worker that does not return, on a busy machine
ROOM = 1 << 30  # address space beyond what an idle worker uses

Open = Callable[[], tuple[str, str]]
Judge = Callable[[random.Random], tuple[str, Open]]


# --- the worker ---


def work(name: str, place: Path) -> None:
    """Answer each seed on standard input with one line of JSON, forever."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not look like an answer
    judge = importlib.import_module(f"tests.fuzz.{name}").start(place)
    if sys.platform == "linux":  # elsewhere the limit has no effect
        limit = memory("VmSize") + ROOM
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print(json.dumps(["ready"]), file=answers, flush=True)
    for line in sys.stdin:
        done, opened = judge(random.Random(line.strip()))
        before, began = reset_peak(), time.process_time()
        try:
            outcome, text = opened()
        except BaseException:
            outcome, text = "BUG", traceback.format_exc()[-1_500:]
        spent, grown = time.process_time() - began, peak() - before
        print(json.dumps([done, outcome, text, spent, grown]), file=answers, flush=True)


def memory(key: str) -> int:
    """Return one memory figure of this process in bytes; outside Linux, always its peak size."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(line for line in status.read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) << 10


def reset_peak() -> int:
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def peak() -> int:
    return memory("VmHWM")


# --- the parent ---


class Worker:
    """A process that opens files; it is restarted after every file that kills it."""

    def __init__(self, name: str, place: Path):
        self.command = [sys.executable, "-m", "tests.fuzz.driver", name, str(place)]
        self.process: subprocess.Popen[str] | None = None
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115

    def ask(self, seed: str) -> list[Any]:
        """Return what was done, outcome, line, seconds and bytes."""
        if self.process is None:
            self.start()
        if (answer := self.answer(seed)) is not None:
            return answer
        code = self.stop()
        self.log.seek(0)
        what = "came back after no" if code is None else f"ended with {code} in"
        return ["?", "BUG", f"the worker {what} {WALL} s: {self.log.read()[-600:]}", WALL, 0]

    def start(self) -> None:
        self.log.seek(0)
        self.log.truncate()
        quiet = {"HF_HUB_OFFLINE": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "0"}
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        self.process = subprocess.Popen(
            self.command, text=True, env={**os.environ, **quiet}, **pipes
        )
        if self.answer() != ["ready"]:
            self.log.seek(0)
            raise SystemExit(f"the worker does not start: {self.log.read()}")

    def answer(self, seed: str = "") -> list[Any] | None:
        process = self.process
        assert process is not None and process.stdin is not None and process.stdout is not None
        if seed:
            print(seed, file=process.stdin, flush=True)
        ready, _, _ = select.select([process.stdout], [], [], WALL if seed else 2 * WALL)
        line = process.stdout.readline() if ready else ""
        return json.loads(line) if line else None

    def stop(self) -> int | None:
        """End the process; return its status if it had ended on its own."""
        process, self.process = self.process, None
        if process is None:
            return None
        try:
            code = process.wait(1)
        except subprocess.TimeoutExpired:
            code = None
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()
        return code


def fuzz(name: str, seeds: list[str], place: Path, say: Callable[[str], None]) -> Counter[str]:
    """Try a file for each seed; return how often each outcome was seen, `BUG` among them."""
    bounds = importlib.import_module(f"tests.fuzz.{name}")
    worker, tally = Worker(name, place), Counter[str]()
    slowest = largest = 0.0
    try:
        for seed in seeds:
            done, outcome, line, seconds, growth = worker.ask(seed)
            if outcome != "BUG" and (seconds > bounds.SECONDS or growth > bounds.GROWTH):
                outcome, line = "BUG", f"{seconds:.1f} s, {growth >> 20} MB, then {outcome}: {line}"
            if outcome == "BUG":
                worker.stop()  # memory it still holds must not be counted for the next file
                say(f"--only {seed}: {done}\n    {line}")
            slowest, largest = max(slowest, seconds), max(largest, growth)
            tally[outcome] += 1
    finally:
        worker.stop()
        worker.log.close()
    say(f"slowest {slowest:.2f} s of processor time, largest growth {int(largest) >> 20} MB")
    return tally


def seeds_of(seed: int, count: int) -> list[str]:
    return [f"{seed}-{number}" for number in range(count)]


def main(name: str) -> None:
    parser = argparse.ArgumentParser(prog=f"python -m tests.fuzz.{name}", description=__doc__)
    parser.add_argument("--count", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="make and try this one file again, and keep it")
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp())
    importlib.import_module(f"tests.fuzz.{name}").prepare(place)
    if options.only is not None:
        print(place, *Worker(name, place).ask(options.only), sep="\n")
        return
    seeds = seeds_of(options.seed, options.count)
    tally = fuzz(name, seeds, place, lambda text: print(text, flush=True))
    for outcome, times in tally.most_common():
        print(f"{times:6d}  {outcome}")
    raise SystemExit(1 if tally["BUG"] else 0)


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]))
