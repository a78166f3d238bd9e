"""The command line as its users meet it: whole transcripts, streams, exit status, a terminal."""

import json
import math
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from string import ascii_lowercase
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny import tiny_config, tiny_tokenizer, tiny_weights, write_tiny
from typer.testing import CliRunner

import mlx_stream
from mlx_stream import ChatSession, Sampling
from mlx_stream.cli import app
from mlx_stream.generate import TokenStream

VERBS = ("chat", "generate", "score", "bench", "doctor", "ls")
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
TEXT = "The man and the other one sat in the shade of a hill, and he said: I see it is so.\n" * 3
GREEDY = ("--temp", "0")
ENDLESS = (*GREEDY, "--max-tokens", "100000")
CLOSED = "mlx_stream: standard output was closed before everything was written\n"
DEADLINE = 60.0


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model that says anything."""
    config = tiny_config()
    return write_tiny(tmp_path_factory.mktemp("cli") / "tiny", config, tiny_weights(config))


@pytest.fixture(scope="session")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model that, when greedy, writes letters for ever and nothing else."""
    config = tiny_config(**SMALL)
    del config["eos_token_id"]
    weights = tiny_weights(config)
    head = weights["lm_head.weight"]
    vocabulary = tiny_tokenizer().get_vocab()
    ids = [vocabulary[letter] for letter in ascii_lowercase]
    rows = np.zeros_like(head)
    # Of a row and its negative one is above the zeros of all other tokens, whatever was read.
    rows[ids[0::2]], rows[ids[1::2]] = head[ids[0::2]], -head[ids[0::2]]
    folder = write_tiny(
        tmp_path_factory.mktemp("cli") / "letters", config, weights | {"lm_head.weight": rows}
    )
    edit(folder / "tokenizer_config.json", eos_token=None)
    return folder


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None takes one out."""
    value = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


def run(*args: object, stdin: str | bytes = b"") -> SimpleNamespace:
    """Run the command line in this process; an exception that is no exit is a failure."""
    result = CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return SimpleNamespace(code=result.exit_code, out=result.stdout, err=result.stderr)


def done(*args: object, stdin: str | bytes = b"") -> SimpleNamespace:
    result = run(*args, stdin=stdin)
    assert result.code == 0, result.err
    return result


def parsed(text: str) -> dict[str, Any]:
    """Read exactly one JSON object on one line: strictly, so no NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    assert text.endswith("}\n") and text.count("\n") == 1
    return json.loads(text, parse_constant=refuse)


def program(*args: object) -> list[str]:
    return [sys.executable, "-m", "mlx_stream", *(str(arg) for arg in args)]


@contextmanager
def started(
    *args: object, stdin: int = subprocess.DEVNULL, stdout: Any = subprocess.PIPE, **changed: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run the real program, in a changed environment, and be sure that it ends."""
    # Some machines set this for all; what the interpreter writes at exit is then not tested.
    inherited = {name: x for name, x in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        program(*args),
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.PIPE,
        env={**inherited, **changed},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def stderr_of(process: subprocess.Popen[bytes]) -> str:
    assert process.stderr is not None
    process.wait(DEADLINE)
    return process.stderr.read().decode()


# --- chat, piped ---


def test_chat_answers_each_line_and_says_nothing_else(letters: Path) -> None:
    result = done("chat", letters, *GREEDY, "--max-tokens", 12, stdin="Hello\nAnd then?\n")
    assert re.fullmatch(r"[a-z]{12}\n[a-z]{12}\n", result.out)
    assert result.err == ""


def test_chat_is_a_chat_session(tiny: Path) -> None:
    sampling = Sampling(1.1, 40, 0.95, 0.01, 1.2, 7)
    session = ChatSession(
        mlx_stream.load(tiny), "Be brief.", 48, 2, sampling, max_tokens=30, stop=["e", "zz"]
    )
    expected = "".join(
        "".join(piece.text for piece in session.reply(question)) + "\n"
        for question in ("Hello there", "And then?")
    )
    options = "--window 48 --sinks 2 --temp 1.1 --top-k 40 --top-p 0.95 --min-p 0.01 --seed 7"
    more = "--repetition-penalty 1.2 --max-tokens 30 --stop e --stop zz --dtype float32"
    system = ("--system", "Be brief.")
    lines = "Hello there\n\n   \n\tAnd then?  \n \n"
    result = done("chat", tiny, *system, *options.split(), *more.split(), stdin=lines)
    assert result.out == expected
    other = done("chat", tiny, *options.split(), *more.split(), stdin=lines)
    assert other.out != expected


def test_chat_of_no_lines_or_without_a_last_newline(letters: Path) -> None:
    for nothing in ("", "\n \n\t\n"):
        assert done("chat", letters, *GREEDY, stdin=nothing).out == ""
    whole = done("chat", letters, *GREEDY, "--max-tokens", 5, stdin="Hello\r\nso\r\n").out
    assert done("chat", letters, *GREEDY, "--max-tokens", 5, stdin="Hello\nso").out == whole


def test_stats_go_to_standard_error(letters: Path) -> None:
    options = ("chat", letters, *GREEDY, "--max-tokens", 40, "--window", 24, "--seed", 5)
    quiet, result = (done(*options, *more, stdin="a\nb\n") for more in ((), ("--stats",)))
    assert result.out == quiet.out
    # Of what is attended the user is told once, with and without.
    assert quiet.err.startswith("mlx_stream: the window of 24 tokens is full: from now on")
    assert quiet.err.count("\n") == 1 == result.err.count(quiet.err)
    line = (
        r"\[28 of 28 tokens attended, [\d,]+ evicted; \d+\.\d tok/s, reading \d+ tok/s; "
        r"cache \d+\.\d MB; seed 5\]\n"
    )
    assert re.fullmatch(f"({line}){{2}}", result.err.replace(quiet.err, ""))


def test_a_turn_longer_than_the_window_is_said_on_standard_error(letters: Path) -> None:
    result = done("chat", letters, *GREEDY, "--max-tokens", 4, "--window", 8, stdin="the man " * 20)
    assert re.fullmatch(r"[a-z]{4}\n", result.out)
    longer, full = result.err.splitlines()
    assert re.match(r"mlx_stream: this turn of \d+ tokens is longer than the window of 8: ", longer)
    assert full.startswith("mlx_stream: the window of 8 tokens is full: ")


# --- generate ---


def test_the_seed_decides_and_greedy_needs_none(tiny: Path) -> None:
    def said(*options: object) -> str:
        return done("generate", tiny, "-p", "The man", "--max-tokens", 24, *options).out

    assert said("--seed", 3) == said("--seed", 3) != said("--seed", 4)
    assert said() != said()
    assert said(*GREEDY) == said(*GREEDY, "--seed", 4)


def test_generate_reads_its_prompt_as_it_is(tiny: Path) -> None:
    options = ("generate", tiny, "--seed", 1, "--max-tokens", 16)
    texts = {
        text: done(*options, "-p", text).out for text in ("a\n b\n", "a\n b", "<|im_start|>", "€")
    }
    for text, out in texts.items():
        assert done(*options, "-p", "-", stdin=text).out == out
    assert len(set(texts.values())) == len(texts)


def test_a_long_standard_input_passes_through_a_small_window(letters: Path) -> None:
    options = ("generate", letters, "-p", "-", *GREEDY, "--window", 32, "--max-tokens", 20)
    prompt = " the" * 50_000
    assert len(prompt) == 200_000
    ran = done(*options, "--json", stdin=prompt)
    result = parsed(ran.out)
    assert [f"mlx_stream: {notice}" for notice in result["notices"]] == ran.err.splitlines()
    assert ran.err.startswith("mlx_stream: the text of 50,000 tokens is longer than sinks and ")
    assert re.fullmatch(r"[a-z]{20}", result["text"])
    assert result["prompt_tokens"] == 50_000 and result["attended"] == 36
    assert result["evicted"] == 50_000 + 19 - 36


def test_generate_as_json_is_the_same_text(tiny: Path) -> None:
    options = ("generate", tiny, "-p", "The man", "--seed", 3)
    result = done(*options, "--max-tokens", 9, "--json")
    assert result.err == ""
    found = parsed(result.out)
    assert found.keys() == {
        *("text", "finish", "prompt_tokens", "reply_tokens", "prompt_tokens_per_second"),
        *("tokens_per_second", "attended", "evicted", "sinks", "window", "cache_bytes", "seed"),
        "notices",
    }
    assert (found["finish"], found["reply_tokens"], found["seed"]) == ("length", 9, 3)
    assert (found["sinks"], found["window"]) == (4, 508)
    plain = done(*options, "--max-tokens", 9).out
    assert plain == found["text"] + "\n"
    stop = found["text"].strip()[-1]
    stopped = parsed(done(*options, "--max-tokens", 9, "--json", "--stop", stop).out)
    assert stopped["finish"] == "stop"
    assert stopped["text"] == found["text"].partition(stop)[0]


def test_a_reply_ends_where_the_model_ends_it(letters: Path, tmp_path: Path) -> None:
    said = done("generate", letters, "-p", "a", *GREEDY, "--max-tokens", 9).out.strip()
    folder = Path(shutil.copytree(letters, tmp_path / "ends"))
    edit(folder / "config.json", eos_token_id=tiny_tokenizer().get_vocab()[said[-1]])
    expected = said.partition(said[-1])[0]
    result = parsed(done("generate", folder, "-p", "a", *GREEDY, "--json").out)
    assert (result["text"], result["finish"]) == (expected, "end")
    assert result["reply_tokens"] == len(expected)
    assert done("generate", folder, "-p", "a", *GREEDY).out == f"{expected}\n"


# --- score ---


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def scored(*args: object, stdin: str | bytes = b"") -> dict[str, Any]:
    result = done("score", *args, "--json", stdin=stdin)
    assert result.err == ""
    return parsed(result.out)


def test_score_as_json(tiny: Path, text: Path) -> None:
    count = len(mlx_stream.load(tiny).tokenizer.encode(TEXT))
    found = scored(tiny, text, "--window", 24)
    assert found.keys() == {
        *("tokens", "perplexity", "nll", "evicted", "seconds", "active_bytes", "peak_bytes")
    }
    assert found["tokens"] == len(found["nll"]) == count - 1
    mean = math.fsum(found["nll"]) / len(found["nll"])
    assert found["perplexity"] == pytest.approx(math.exp(mean), rel=1e-9)
    assert found["evicted"] == count - 1 - 28
    assert 0 < found["active_bytes"] <= found["peak_bytes"] and found["seconds"] > 0
    assert all(type(found[key]) is int for key in ("tokens", "evicted", "peak_bytes"))
    assert scored(tiny, "-", "--window", 24, stdin=TEXT)["nll"] == found["nll"]


def test_score_is_what_the_model_says_of_each_next_token(tiny: Path, text: Path) -> None:
    model = mlx_stream.load(tiny)
    ids = model.tokenizer.encode(TEXT)
    found = scored(tiny, text, "--window", 24)["nll"]
    for count in (1, 2, 28, 29, len(ids) - 1):
        logits = np.array(TokenStream(model, model.new_cache(4, 24)).read(ids[:count]))
        expected = np.logaddexp.reduce(logits) - logits[ids[count]]
        assert found[count - 1] == pytest.approx(expected, abs=2e-3)


def test_score_does_not_depend_on_the_chunk(tiny: Path, text: Path) -> None:
    one, *others = (
        scored(tiny, text, "--window", 24, "--sinks", 2, "--chunk", chunk)["nll"]
        for chunk in (1, 7, 64, 1000)
    )
    for other in others:
        assert np.allclose(one, other, rtol=0, atol=2e-3)
    wider = scored(tiny, text, "--window", 40, "--sinks", 2)["nll"]
    assert not np.allclose(one, wider, rtol=0, atol=0.1)


def test_score_of_a_window_that_holds_the_text_is_dense(tiny: Path, text: Path) -> None:
    dense, streamed = scored(tiny, text, "--dense"), scored(tiny, text, "--window", 500)
    assert dense["evicted"] == streamed["evicted"] == 0
    assert np.allclose(dense["nll"], streamed["nll"], rtol=0, atol=2e-3)


def test_score_counts_input_tokens(tiny: Path, text: Path) -> None:
    whole, part = (scored(tiny, text, *more)["nll"] for more in ((), ("--max-tokens", 10)))
    assert len(part) == 9 and np.allclose(part, whole[:9], rtol=0, atol=2e-3)


def test_score_for_people(tiny: Path, text: Path) -> None:
    found = scored(tiny, text)
    result = done("score", tiny, text)
    pattern = (
        r"perplexity ([\d.]+) over ([\d,]+) tokens\n0 evicted; [\d.]+ tok/s; "
        r"[\d.]+ MB active, [\d.]+ MB at peak\n"
    )
    match = re.fullmatch(pattern, result.out)
    assert match is not None and result.err == ""
    assert float(match[1]) == pytest.approx(found["perplexity"], abs=1e-3)
    assert int(match[2].replace(",", "")) == found["tokens"]


# --- doctor, ls, help, bench ---


def test_doctor_says_what_is_here() -> None:
    result = done("doctor", "--json")
    facts = parsed(result.out)
    assert result.err == ""
    assert facts.keys() == {
        *("mlx_stream", "mlx", "mlx-lm", "python", "system", "device", "metal", "openblas"),
        *("memory_budget_bytes", "cores", "cache", "advice"),
    }
    assert facts["cache"].startswith(os.environ["MLX_STREAM_HOME"])
    assert all(isinstance(line, str) and line for line in facts["advice"])
    lines = done("doctor").out.splitlines()
    rows = dict(line.split(maxsplit=1) for line in lines[1 : lines.index("")])
    assert rows == {name: str(value) for name, value in facts.items() if name != "advice"}
    assert [line[2:] for line in lines[lines.index("") + 1 :]] == (
        facts["advice"] or ["nothing here will be slower than it must be"]
    )


def test_ls_of_nothing() -> None:
    result = done("ls")
    assert result.out == ""
    assert result.err == (
        "mlx_stream: no models are cached yet; `mlx_stream chat` fetches the starter\n"
    )
    result = done("ls", "--json")
    assert (parsed(result.out), result.err) == ({"models": []}, "")


def test_a_cached_model_is_listed_and_opens_without_the_network(tiny: Path) -> None:
    folder = Path(os.environ["HF_HOME"]) / "hub" / "models--org--name"
    snapshot = folder / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    for path in tiny.iterdir():
        (snapshot / path.name).symlink_to(path)
    result = done("ls")
    assert result.err == ""
    assert [line.split()[0] for line in result.out.splitlines()] == ["model", "org/name"]
    [entry] = parsed(done("ls", "--json").out)["models"]
    assert entry.keys() == {"name", "kind", "bytes", "path"}
    assert (entry["name"], entry["kind"]) == ("org/name", "hub")
    options = ("-p", "a", *GREEDY, "--max-tokens", 8)
    by_name, by_path = (done("generate", name, *options) for name in ("org/name", tiny))
    assert (by_name.out, by_name.err) == (by_path.out, "")


def test_help_names_every_verb() -> None:
    found = subprocess.run(
        program("--help"), capture_output=True, text=True, timeout=DEADLINE, check=True
    )
    assert found.stderr == ""
    assert all(re.search(rf"\b{verb}\b", found.stdout) for verb in VERBS)
    registered = [command.callback for command in app.registered_commands]
    assert {verb.__name__ for verb in registered if verb} == set(VERBS)
    for verb in VERBS:
        assert done(verb, "--help").out == done(verb, "-h").out != ""


def plain(text: str) -> str:
    """Take out colours, and the frame's line breaks."""
    return " ".join(re.sub(r"\x1b\[[\d;]*m|[│╭╮╰╯─]", " ", text).split())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nonsense"], "nonsense"),
        (["--nonsense"], "--nonsense"),
        (["chat", "x", "--nonsense"], "--nonsense"),
        (["chat", "x", "y"], "y"),
        (["generate", "x"], "--prompt"),
        (["score"], "FILE"),
        (["score", "x", "y", "--window", "many"], "--window"),
        (["bench", "x", "--pairs", "2.5"], "--pairs"),
        (["generate", "x", "-p"], "-p"),
        (["ls", "x"], "x"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], named: str) -> None:
    result = run(*arguments)
    assert (result.code, result.out) == (2, "")
    assert named in plain(result.err) and "Traceback" not in result.err


def test_bench_compares_with_mlx_lm(tiny: Path) -> None:
    # A process of its own: mlx-lm imports much that other tests are better without.
    command = program("bench", tiny, "--json", "--pairs", 3, "--window", 64, "--chunk", 16)
    found = subprocess.run(command, capture_output=True, text=True, timeout=2 * DEADLINE)
    assert found.returncode == 0, found.stderr
    assert all(line.startswith("mlx_stream: ") for line in found.stderr.splitlines())
    result = parsed(found.stdout)
    assert result.keys() >= {"model", "dtype", "quantized", "against", "windows", "machine"}
    assert (result["against"], result["dtype"], result["quantized"]) == ("mlx-lm", "float32", False)
    assert list(result["windows"]) == ["64"]
    window = result["windows"]["64"]
    assert window["decode"]["pairs"] == window["prefill"]["pairs"] == 3
    for kind in ("decode", "prefill"):
        assert window[f"{kind}_ratio"] == window[kind]["ratio_quartiles"][1] > 0


# --- the real program, and streams that go away ---


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_a_closed_standard_output_ends_a_reply(letters: Path, verb: str) -> None:
    prompt = ("-p", "the") if verb == "generate" else ()
    with started(verb, letters, *prompt, *ENDLESS, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"Hello\nagain\n")
        process.stdin.close()
        assert process.stdout.read(1).isalpha()
        process.stdout.close()
        assert stderr_of(process) == CLOSED
        assert process.returncode == 1


def test_a_closed_standard_output_ends_a_long_result(letters: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text(" the and" * 5_000)  # its JSON is larger than what a pipe holds
    with started("score", letters, path, "--window", 16, "--json") as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"{"
        process.stdout.close()
        assert stderr_of(process) == CLOSED
        assert process.returncode == 1


def test_a_standard_output_closed_before_the_first_byte() -> None:
    with started("ls", "--json") as process:
        assert process.stdout is not None
        process.stdout.close()
        assert stderr_of(process) == CLOSED
        assert process.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_said_in_one_line(letters: Path) -> None:
    with (
        Path("/dev/full").open("wb") as full,
        started("generate", letters, "-p", "the", *GREEDY, stdout=full) as process,
    ):
        assert stderr_of(process) == (
            "mlx_stream: standard output was full before everything was written\n"
        )
        assert process.returncode == 1


def test_an_interrupt_ends_generate(letters: Path) -> None:
    with started("generate", letters, "-p", "the", *ENDLESS) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert (first + process.stdout.read()).isalpha()
        assert stderr_of(process) == "mlx_stream: interrupted\n"
        assert process.returncode == 130


def test_a_narrow_encoding_gets_escapes(tiny: Path) -> None:
    options = ("generate", tiny, "-p", "The man", "--seed", 3, "--max-tokens", 24)
    wide = done(*options).out
    assert not wide.isascii()
    with started(*options, PYTHONIOENCODING="ascii") as process:
        assert stderr_of(process) == "" and process.stdout is not None
        assert process.stdout.read() == wide.encode("ascii", "backslashreplace")


UNWANTED = ("mlx_lm", "transformers", "huggingface_hub", "torch", "typer", "rich")
IMPORTS = """
import sys
def unwanted():
    return [name for name in {names} if name in sys.modules]
import mlx_stream
assert not unwanted(), unwanted()
session = mlx_stream.ChatSession(mlx_stream.load({folder!r}), max_tokens=3)
assert "".join(piece.text for piece in session.reply("Hello"))
assert "".join(piece.text for piece in mlx_stream.stream(session.model, "the", max_tokens=3))
assert not unwanted(), unwanted()
"""


def test_importing_loading_and_replying_import_nothing_heavy(letters: Path) -> None:
    code = IMPORTS.format(names=UNWANTED, folder=str(letters))
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE
    )
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


# --- a terminal ---

# Makes the terminal that standard input is the controlling one, so that Ctrl-C is a signal.
CONTROLLED = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "mlx_stream", *sys.argv[1:]])
"""


class Terminal:
    """The program on a pseudo-terminal: what a user types and sees."""

    def __init__(self, *args: object, **environment: str):
        self.ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", CONTROLLED, *(str(arg) for arg in args)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env={**os.environ, "TERM": "dumb", **environment},
        )
        os.close(theirs)
        self.seen = b""

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.ours)

    def type(self, keys: bytes) -> None:
        os.write(self.ours, keys)

    def sees(self, pattern: bytes) -> bytes:
        """Wait until the screen shows a pattern after what was looked for last; return both."""
        shown = self.shows(pattern, DEADLINE)
        assert shown, f"no {pattern!r} in {self.seen!r}"
        return shown

    def shows(self, pattern: bytes, seconds: float) -> bytes:
        """Do as `sees`, but return nothing if the time is over or the program is."""
        end = time.monotonic() + seconds
        while (match := re.search(pattern, self.seen, re.DOTALL)) is None:
            if time.monotonic() > end or not self._read():
                return b""
        shown, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return shown

    def leaves(self) -> int:
        """Wait for the end, with the screen read; return the exit status."""
        end = time.monotonic() + DEADLINE
        while self._read():
            assert time.monotonic() < end, f"it goes on: {self.seen!r}"
        return self.process.wait(DEADLINE)

    def _read(self) -> bool:
        """Read what there is; return whether the program is still there."""
        if not select.select([self.ours], [], [], 0.2)[0]:
            return self.process.poll() is None
        try:
            data = os.read(self.ours, 65_536)
        except OSError:  # Linux, once nobody holds the other side
            return False
        self.seen += data
        return bool(data)


def test_a_terminal_prompts_answers_and_ends_with_control_d(letters: Path) -> None:
    with Terminal("chat", letters, *GREEDY, "--max-tokens", 12) as terminal:
        assert terminal.sees(rb"> ").endswith(b"508 tokens attended; Ctrl-D leaves\r\n> ")
        terminal.type(b"Hello\n")
        assert re.search(rb"\r\n[a-z]{12}\r\n> $", terminal.sees(rb"\r\n> "))
        for blank in (b"\n", b" \n"):
            terminal.type(blank)
            assert not re.search(rb"[a-z]", terminal.sees(rb"> "))
        terminal.type(b"And?\n")
        assert re.search(rb"\r\n[a-z]{12}\r\n> $", terminal.sees(rb"\r\n> "))
        terminal.type(b"\x04")
        assert terminal.leaves() == 0
        assert b"Traceback" not in terminal.seen


def test_control_c_ends_a_reply_and_not_the_program(letters: Path) -> None:
    with Terminal("chat", letters, *ENDLESS) as terminal:
        terminal.sees(rb"> ")
        for question in (b"Hello", b"And then?", b"So?"):
            terminal.type(question + b"\n")
            terminal.sees(rb"\r\n[a-z]{30}")
            terminal.type(b"\x03")
            shown = re.sub(rb"mlx_stream: the window [^\r]*\r\n", b"", terminal.sees(rb"> "))
            assert re.fullmatch(rb"[a-z]*(\^C)?[a-z]*\r\n> ", shown)
            assert terminal.process.poll() is None
        terminal.type(b"\x04")
        assert terminal.leaves() == 0


def test_control_c_at_the_prompt_drops_the_line(letters: Path) -> None:
    with Terminal("chat", letters, *GREEDY, "--max-tokens", 12) as terminal:
        terminal.sees(rb"> ")
        terminal.type(b"not this")
        terminal.sees(rb"not this")
        # Python's input() sleeps through a signal that comes while it handles a key.
        for _ in range(10):
            terminal.type(b"\x03")
            if terminal.shows(rb"\(Ctrl-D leaves\)\r\n> ", 5.0):
                break
        terminal.type(b"Hello\n")
        answer = terminal.sees(rb"Hello\r\n[a-z]*\r\n> ")
        terminal.type(b"\x04")
        assert terminal.leaves() == 0
    alone = done("chat", letters, *GREEDY, "--max-tokens", 12, stdin="Hello\n").out
    assert answer.endswith(b"\r\n" + alone.strip().encode() + b"\r\n> ")


def test_a_typed_line_that_is_not_text_is_typed_again(letters: Path) -> None:
    strict = {"PYTHONIOENCODING": "utf-8:strict"}
    with Terminal("chat", letters, *GREEDY, "--max-tokens", 12, **strict) as terminal:
        terminal.sees(rb"> ")
        terminal.type(b"\xff\xfe\n")
        assert b"Traceback" not in terminal.sees(rb"\r\n> ")
        terminal.type(b"Hello\n")
        assert re.search(rb"\r\n[a-z]{12}\r\n> $", terminal.sees(rb"\r\n> "))
        terminal.type(b"\x04")
        assert terminal.leaves() == 0
