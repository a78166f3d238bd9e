"""Feeds hostile files to the loader and counts what becomes of them; knows no mutation.

    python -m tests.fuzz.checkpoints --count 3000 --seed 1

Each file must be refused in one line by an error of ours, or load and run. A worker process opens
them, so that a crash is one file's; it is held to two seconds of processor time and to a bound of
memory for each. Exit status 1 if anything else happened, with the seed that makes the file again.
"""

import argparse
import json
import os
import random
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 2.0  # of processor time, in the worker
WALL = 60.0  # for a worker that does not come back, on a machine with other work
ROOM = 1 << 30  # address space beyond what a worker has at rest
GROWTH = 256 << 20  # memory in use beyond that

QUESTION = "The theory: in 1234 they'll see <|im_end|> Été 東京 🙂 " + "a" * 30 + "! e"


# --- the worker: what is tried with each file ---


def load_and_talk(path: Path) -> None:
    """Load a model, complete a text and hold a conversation with it."""
    from mlx_stream import ChatSession, load
    from mlx_stream.generate.completion import stream
    from mlx_stream.sampling import Sampling

    model = load(path, keep_quantized=path.stem.endswith("q"))
    "".join(piece.text for piece in stream(model, QUESTION, 3, Sampling(0.0), window=16))
    chat = ChatSession(model, "Be brief.", window=min(64, model.config.max_position_embeddings - 4))
    for question in ("Hi", QUESTION):
        "".join(piece.text for piece in chat.reply(question, max_tokens=2))


def read_truly(path: Path) -> None:
    """Read a folder's tensors, and hold them to a second, plain reading of the same bytes."""
    import mlx.core as mx
    import numpy as np

    from mlx_stream.checkpoint.folder import read_folder

    if not path.is_dir():
        return
    unsigned = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}
    found = read_folder(path).tensors
    for shard in path.glob("*.safetensors"):
        content = shard.read_bytes()
        begin = 8 + int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8:begin]).items():
            if name != "__metadata__" and name in found:
                start, stop = (begin + offset for offset in entry["data_offsets"])
                array = found[name]
                bits = np.array(mx.view(array, unsigned[array.itemsize]))
                assert list(array.shape) == entry["shape"], name
                assert bits.tobytes() == content[start:stop], name


def convert_and_load(path: Path) -> None:
    """Convert a model, which is whole or leaves nothing, and load what came of it."""
    from mlx_stream import load
    from mlx_stream.errors import MlxStreamError
    from mlx_stream.quantize.convert import ConvertOptions, convert_model
    from mlx_stream.quantize.recipes import uniform_recipe

    out = path.parent / "out" / "converted"
    shutil.rmtree(out.parent, ignore_errors=True)
    recipe = uniform_recipe(4, 32) if path.stem.endswith("q") else None
    try:
        convert_model(str(path), out, ConvertOptions(recipe, None if recipe else "float16"))
    except MlxStreamError:
        assert not out.parent.exists() or list(out.parent.iterdir()) == [], "something is left"
        raise
    load(out)


# Every way in which this package opens a checkpoint that nobody vouches for.
TRIES: list[Callable[[Path], None]] = [load_and_talk, read_truly, convert_and_load]


def attempt(path: Path) -> tuple[str, str]:
    """Return what became of a file, and the line that says so."""
    from mlx_stream.errors import MlxStreamError

    outcome = ("ran", "")
    for way in TRIES:
        try:
            way(path)
        except MlxStreamError as error:
            line = str(error)
            # The command line folds what a file's own words break.
            if len(line) > 1_000:
                return "BUG", f"{way.__name__}: a line of {len(line)} characters: {line[:200]}"
            outcome = (type(error).__name__, line)
        except BaseException:
            return "BUG", f"{way.__name__}: {traceback.format_exc()[-1_500:]}"
    return outcome


def work() -> None:
    """Answer each path on standard input with one line of JSON, for ever."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not look like an answer
    rest = None
    for line in sys.stdin:
        if rest is None:
            attempt(Path(json.loads(line)))  # a sound model: everything is imported
            rest = bound_memory()
            print(json.dumps(["ready"]), file=answers, flush=True)
            continue
        before = reset_peak()
        began = time.process_time()
        outcome, text = attempt(Path(json.loads(line)))
        spent = time.process_time() - began
        print(json.dumps([outcome, text, spent, peak() - before]), file=answers, flush=True)


def bound_memory() -> int:
    import resource

    if sys.platform == "linux":  # elsewhere the limit is not held
        limit = memory("VmSize") + ROOM
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return 1


def memory(key: str) -> int:
    """Return one figure of this process in bytes; 0 where the system does not say."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
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
    """A process that opens files, started again after each that it did not survive."""

    def __init__(self, sound: Path):
        self.sound = sound
        self.process: subprocess.Popen[str] | None = None
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115

    def ask(self, path: Path) -> list[Any]:
        """Return outcome, line, seconds and bytes."""
        if self.process is None:
            self.start()
        answer = self.answer(path)
        if answer is not None:
            return answer
        code = self.stop()
        self.log.seek(0)
        what = "came back after no" if code is None else f"ended with {code} in"
        return ["BUG", f"the worker {what} {WALL} s: {self.log.read()[-600:]}", WALL, 0]

    def start(self) -> None:
        self.log.seek(0)
        self.log.truncate()
        environment = {
            **os.environ,
            **{"HF_HUB_OFFLINE": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "0"},
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.checkpoints", "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
        )
        if self.answer(self.sound) != ["ready"]:
            raise SystemExit("the worker does not start")

    def answer(self, path: Path) -> list[Any] | None:
        process = self.process
        assert process is not None and process.stdin is not None and process.stdout is not None
        print(json.dumps(str(path)), file=process.stdin, flush=True)
        ready, _, _ = select.select([process.stdout], [], [], WALL)
        line = process.stdout.readline() if ready else ""
        return json.loads(line) if line else None

    def stop(self) -> int | None:
        """End the process; return its status if it had ended by itself."""
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
            if pipe is not None:
                pipe.close()
        return code

    def close(self) -> None:
        self.stop()
        self.log.close()


def fuzz(count: int, seed: int, folder: Path, say: Callable[[str], None]) -> Counter[str]:
    """Try `count` files; return how often each outcome was seen, `BUG` among them."""
    from tests.fuzz.checkpoint_mutations import mutate, remove, write_originals

    originals = write_originals(folder / "originals")
    worker = Worker(originals[0])
    tally: Counter[str] = Counter()
    slowest = largest = 0.0
    try:
        for original in originals:
            outcome, line, *_ = worker.ask(original)
            if outcome != "ran":
                raise SystemExit(f"{original.name} is sound, and was not run: {line}")
        for number in range(count):
            draw = random.Random(f"{seed}-{number}")
            done, path = mutate(draw.choice(originals), folder / draw.choice(("m", "mq")), draw)
            outcome, line, seconds, growth = worker.ask(path)
            if outcome != "BUG" and (seconds > SECONDS or growth > GROWTH):
                outcome, line = "BUG", f"{seconds:.1f} s, {growth >> 20} MB, then {outcome}: {line}"
            if outcome == "BUG":
                worker.stop()  # what it still holds must not be taken for the next file's
                say(f"--seed {seed} --only {number}: {done}\n    {line}")
            slowest, largest = max(slowest, seconds), max(largest, growth)
            tally[outcome] += 1
            remove(path)
    finally:
        worker.close()
    say(f"slowest {slowest:.2f} s of processor time, largest growth {int(largest) >> 20} MB")
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=3_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="make and try this one file again, and keep it")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work()
        return
    if options.only is not None:
        again(options.seed, options.only)
        return
    with tempfile.TemporaryDirectory() as folder:
        tally = fuzz(
            options.count, options.seed, Path(folder), lambda text: print(text, flush=True)
        )
    for outcome, times in tally.most_common():
        print(f"{times:6d}  {outcome}")
    raise SystemExit(1 if tally["BUG"] else 0)


def again(seed: int, number: int) -> None:
    from tests.fuzz.checkpoint_mutations import mutate, write_originals

    folder = Path(tempfile.mkdtemp())
    originals = write_originals(folder / "originals")
    draw = random.Random(f"{seed}-{number}")
    done, path = mutate(draw.choice(originals), folder / draw.choice(("m", "mq")), draw)
    print(f"{path}\n{done}", flush=True)
    worker = Worker(originals[0])
    try:
        print(*worker.ask(path), sep="\n")
    finally:
        worker.close()


if __name__ == "__main__":
    main()
