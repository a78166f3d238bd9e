"""Measure how long starting takes: an import, the help, the chat prompt, the first token.

    python -m tests.measure.start_up [--model starter] [--rounds 10]

Each is measured in turn with `python -c pass`, `rounds` times. Prints medians and quartiles in
milliseconds and, for a chat, where the time goes. Nothing is fetched: the model must be cached.
Run it on an otherwise idle machine; not collected by pytest.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time

from tests.fakes.terminals import CTRL_C, CTRL_D, ENTER, Terminal

PASS = [sys.executable, "-c", "pass"]
COMMANDS = {
    "python -c pass": PASS,
    "import mlx_stream": [sys.executable, "-c", "import mlx_stream"],
    "mlx_stream --help": [sys.executable, "-m", "mlx_stream", "--help"],
    "mlx_stream chat --help": [sys.executable, "-m", "mlx_stream", "chat", "--help"],
}
WEIGHTS = {"dequantized": "--dequantize", "quantized": "--keep-quantized"}
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[>=]|[\r\a]")
# Run in a separate process; prints the seconds that `chat` spends on each step before it asks.
PARTS = """
import json, sys, time
marks = [("", time.perf_counter())]
def mark(name): marks.append((name, time.perf_counter()))
import mlx_stream.cli.chat
mark("import the command line")
import mlx.core as mx
from mlx_stream import backend
from mlx_stream.hub.resolve import resolve
from mlx_stream.hub.starter import STARTER_SYSTEM
from mlx_stream.load import read_checkpoint
from mlx_stream.config import read_config
from mlx_stream.chat import resume, session_files
from mlx_stream.text.tokenizer import Tokenizer
from mlx_stream.models.weights import RemainingTensors, build
from mlx_stream.load import load
mark("import the rest")
import mlx_stream.cli.prompt, prompt_toolkit, prompt_toolkit.shortcuts
mark("import the terminal")
path = resolve(sys.argv[1], print)
checkpoint = read_checkpoint(path)
config = read_config(checkpoint.config)
mark("open the files")
tokenizer = Tokenizer.from_checkpoint(checkpoint)
mark("build the tokenizer")
build(config, RemainingTensors(checkpoint.tensors), mx.float32, sys.argv[2] == "quantized")
mark("read the weights" + ("" if sys.argv[2] == "quantized" else ", dequantize them"))
model = load(sys.argv[1], "float32", sys.argv[2] == "quantized")
loaded = time.perf_counter()
resume.new_chat(model, resume.SessionOptions(system=STARTER_SYSTEM), print)
marks.append(("begin the conversation", marks[-1][1] + time.perf_counter() - loaded))
print(json.dumps({b[0]: b[1] - a[1] for a, b in zip(marks, marks[1:])}))
"""


def seconds(command: list[str]) -> float:
    begun = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def chat(model: str, option: str) -> tuple[float, float]:
    """Return the seconds from the shell to the prompt, and from Enter to a reply's first text."""
    begun = time.perf_counter()
    terminal = Terminal("-m", "mlx_stream", "chat", model, option, "--temp", "0")
    terminal.see(" attended · ")
    prompt = time.perf_counter() - begun
    terminal.see(" MB")
    terminal.type("Hi!", ENTER)
    begun, seen = time.perf_counter(), ""
    terminal.see("\n")  # what was typed
    while not ESCAPES.sub("", seen).strip():
        seen += terminal.program.read_nonblocking(4096, timeout=60)
    first = time.perf_counter() - begun
    terminal.type(CTRL_C)
    terminal.see(" attended · ")
    terminal.type(CTRL_D)
    terminal.end()
    return prompt, first


def parts(model: str, weights: str) -> dict[str, float]:
    command = [sys.executable, "-c", PARTS, model, weights]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(printed.splitlines()[-1])


def line(name: str, values: list[float]) -> str:
    low, middle, high = (1e3 * x for x in statistics.quantiles(values, n=4, method="inclusive"))
    return f"{name:<44}{middle:8.0f}   {low:.0f} to {high:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="starter")
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    times: dict[str, list[float]] = {}
    for _ in range(given.rounds):
        for name, command in COMMANDS.items():
            times.setdefault(name, []).append(seconds(command))
        for weights, option in WEIGHTS.items():
            prompt, first = chat(given.model, option)
            times.setdefault(f"chat prompt, {weights}", []).append(prompt)
            times.setdefault(f"first token of a reply, {weights}", []).append(first)
            for name, spent in parts(given.model, weights).items():
                times.setdefault(f"  {weights}: {name}", []).append(spent)
    print(f"{'milliseconds':<44}{'median':>8}   quartiles")
    for name, values in times.items():
        print(line(name, values))
    plain = statistics.median(times["python -c pass"])
    beyond = 1e3 * (statistics.median(times["import mlx_stream"]) - plain)
    print(f"import mlx_stream beyond Python's own start: {beyond:.0f} ms")


if __name__ == "__main__":
    main()
