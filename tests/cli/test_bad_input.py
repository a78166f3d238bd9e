"""Wrong names, options and texts, too little memory: one line that says what to do, status 1."""

import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_stream import backend
from tests.fakes.refusals import ASK, one_line, refused
from tests.fakes.shell import DEADLINE, GREEDY, done, edit, program, run

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The man and the other one sat in the shade.\n", encoding="utf-8")
    return path


# --- where a model comes from ---


@pytest.mark.parametrize("verb", ["chat", "generate", "score", "bench"])
def test_a_missing_model(verb: str, text: Path) -> None:
    more = {"generate": ASK, "score": (text,)}.get(verb, ())
    line = one_line(verb, "./nowhere", *more, stdin="Hello\n")
    assert line == "./nowhere: no such folder or file"
    line = one_line(verb, "nowhere.gguf", *more)
    assert line == "nowhere.gguf: no such folder or file"
    line = one_line(verb, "nowhere", *more)
    assert line.startswith("'nowhere' is not a model; expected a folder, a .gguf file, a Hub id")


def test_a_name_with_line_breaks_stays_on_one_line() -> None:
    assert one_line("chat", "./no\n\nwhere") == "./no where: no such folder or file"


def test_what_is_no_model(text: Path) -> None:
    assert refused(text) == f"{text}: not a model; expected a folder or a .gguf file"


@pytest.mark.parametrize("verb", ["chat", "generate", "score", "bench"])
def test_an_unreachable_hub_is_given_up_at_once(verb: str, text: Path) -> None:
    more = {"generate": ASK, "score": (text,)}.get(verb, ())
    started = time.monotonic()
    line = one_line(verb, "org/name", *more)
    assert time.monotonic() - started < 10
    assert re.fullmatch(
        r"org/name: not in the cache, and \S+ cannot be reached \(\w+\); check the network, or "
        r"give a folder or a \.gguf file",
        line,
    )


# --- options ---


STREAMED: list[tuple[list[object], str]] = [
    (["--window", 0], "--window must be at least 1, not 0"),
    (["--window", -5], "--window must be at least 1, not -5"),
    (["--sinks", -1], "--sinks must be from 0 to 511, not -1"),
    (["--sinks", 512], "--sinks must be from 0 to 511, not 512"),
    (
        ["--window", 509],
        "sinks 4 + window 509 = 513 tokens exceed the model's trained context of 512: use a window "
        "of at most 508",
    ),
    (
        ["--window", 500, "--sinks", 20],
        "sinks 20 + window 500 = 520 tokens exceed the model's trained context of 512: use a "
        "window of at most 492",
    ),
    (["--dtype", "int8"], "--dtype must be one of float32, float16, bfloat16, not 'int8'"),
    (["--dtype", ""], "--dtype must be one of float32, float16, bfloat16, not ''"),
]
SAMPLED: list[tuple[list[object], str]] = [
    (["--temp", -1], "--temp must be 0 or more, not -1.0"),
    (["--temp", "nan"], "--temp must be 0 or more, not nan"),
    (["--temp", "inf"], "--temp must be 0 or more, not inf"),
    (["--top-p", 0], "--top-p must be above 0 and at most 1, not 0.0"),
    (["--top-p", 1.01], "--top-p must be above 0 and at most 1, not 1.01"),
    (["--min-p", 2], "--min-p must be from 0 to 1, not 2.0"),
    (["--min-p", -0.1], "--min-p must be from 0 to 1, not -0.1"),
    (["--top-k", -1], "--top-k must be 0 or more, not -1"),
    (["--repetition-penalty", 0], "--repetition-penalty must be from 0.01 to 100, not 0.0"),
    (["--seed", -1], "--seed must be from 0 to 2^64 - 1, not -1"),
    (["--seed", 2**64], "--seed must be from 0 to 2^64 - 1, not 18446744073709551616"),
    (["--max-tokens", 0], "--max-tokens must be at least 1, not 0"),
    (["--max-tokens", -3], "--max-tokens must be at least 1, not -3"),
    (["--stop", ""], "--stop must not be an empty text"),
    (["--stop", "x", "--stop", ""], "--stop must not be an empty text"),
]


@pytest.mark.parametrize(("options", "expected"), [*STREAMED, *SAMPLED])
def test_options_out_of_range(whole: Path, options: list[object], expected: str) -> None:
    assert one_line("generate", whole, "-p", "the", *options) == expected
    assert one_line("chat", whole, *options, stdin="the\n") == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        *STREAMED,
        (["--chunk", 0], "--chunk must be at least 1, not 0"),
        (["--chunk", -1], "--chunk must be at least 1, not -1"),
        (["--max-tokens", 0], "--max-tokens must be at least 2, not 0"),
        (["--max-tokens", 1], "--max-tokens must be at least 2, not 1"),
        (
            ["--dense", "--sinks", 2],
            "--dense attends to everything: leave out --window, --sinks and --kv-bits",
        ),
    ],
)
def test_options_of_score_out_of_range(
    whole: Path, text: Path, options: list[object], expected: str
) -> None:
    assert one_line("score", whole, text, *options) == expected
    assert one_line("score", whole, text, "--json", *options) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--pairs", 2], "--pairs must be at least 3, not 2"),
        (["--chunk", 1], "--chunk must be at least 2, not 1"),
        (["--prefill", 1], "--prefill must be at least 2, not 1"),
        (["--prefill", 9, "--prefill-chunk", 1], "--prefill-chunk must be at least 2, not 1"),
        (["--window", 64, "--window", 0], "--window must be at least 1, not 0"),
        (["--window", 4096], "use a window of at most 508"),
        (["--against", "llama.cpp"], "--against must be one of mlx-lm, not 'llama.cpp'"),
        (["--dtype", "int8"], "--dtype must be one of float32, float16, bfloat16, not 'int8'"),
    ],
)
def test_options_of_bench_out_of_range(
    whole: Path, options: list[object], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # mlx-lm itself is not needed to refuse, and is slow to import.
    monkeypatch.setattr("mlx_stream.evaluate.mlx_lm.load_peer", lambda folder, model: None)
    more = () if "--window" in options else ("--window", 64)
    assert expected in one_line("bench", whole, *more, *options)


# --- texts ---


def test_texts_that_cannot_be_scored(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "given.txt"

    def line() -> str:
        return one_line("score", whole, path)

    assert line() == f"{path}: cannot be read: No such file or directory"
    path.write_bytes(b"")
    assert line() == f"{path}: is empty: give a text of at least one character"
    path.write_bytes("Größe".encode("latin-1"))
    assert line() == (
        f"{path}: is not UTF-8 (byte 2 is 0xf6): convert it, for instance with iconv -t UTF-8"
    )
    path.write_bytes(b"good " * 1000 + b"\xe2\x82")
    assert "(byte 5000 is 0xe2)" in line()
    path.write_bytes(b"a")
    assert re.fullmatch(r"the text has 1 token: at least two are needed to predict one", line())
    path.unlink()
    path.mkdir()
    assert line() == f"{path}: is a folder: after the model, give the text file to score"


def test_score_of_a_model_alone_says_it_wants_a_text(whole: Path) -> None:
    assert one_line("score", whole) == (
        f"{whole}: is a folder: after the model, give the text file to score"
    )


@pytest.mark.parametrize("verb", ["generate", "score"])
def test_a_standard_input_that_is_no_text(whole: Path, verb: str) -> None:
    command = ("score", whole, "-") if verb == "score" else ("generate", whole, "-p", "-")
    assert one_line(*command, stdin=b"") == (
        "standard input: is empty: give a text of at least one character"
    )
    assert one_line(*command, stdin=b"the\n\xffman").startswith(
        "standard input: is not UTF-8 (byte 4 is 0xff): convert it"
    )


def test_a_prompt_that_is_no_text(whole: Path) -> None:
    assert one_line("generate", whole, "-p", "") == (
        "the prompt is empty: give at least one character"
    )
    # What an argument that is not UTF-8 becomes.
    assert "character 3 is half of a surrogate pair" in one_line(
        "generate", whole, "-p", "abc\udcff"
    )


def test_a_line_of_chat_that_is_not_utf8(whole: Path) -> None:
    options = ("chat", whole, *GREEDY, "--max-tokens", 4)
    assert one_line(*options, stdin=b"\xe9t\xe9\nHello\n").startswith(
        "standard input, line 1: is not UTF-8 (byte 0 is 0xe9): convert it"
    )
    first = done(*options, stdin=b"Hello\n").out
    line = one_line(*options, stdin=b"Hello\n\nso \xff\nand\n", out=first)
    assert line.startswith("standard input, line 3: is not UTF-8 (byte 3 is 0xff): convert it")


# --- memory ---

REFUSAL = (
    r"([\d,.]+) MB of weights and ([\d,.]+) MB of keys and values exceed the ([\d,.]+) MB this "
    r"device recommends: use a smaller window, a quantized model, or --force"
)


@pytest.fixture
def budget(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda amount: monkeypatch.setattr(backend, "memory_budget", lambda: amount)


def test_weights_beyond_memory_are_refused_unless_forced(
    whole: Path, text: Path, budget: Callable[[int], None]
) -> None:
    budget(1000)
    for command in (
        ("generate", whole, *ASK),
        ("chat", whole, *GREEDY, "--max-tokens", 4),
        ("score", whole, text),
        ("bench", whole),
    ):
        assert re.fullmatch(REFUSAL, one_line(*command, stdin="Hello\n"))
        if command[0] != "bench":
            assert done(*command, "--force", stdin="Hello\n").out


def test_a_ring_beyond_memory_is_refused_with_the_numbers(
    model: Path, text: Path, budget: Callable[[int], None]
) -> None:
    edit(model / "config.json", max_position_embeddings=10_000_000)
    budget(2**29)
    wide = ("--window", 9_999_996)
    for command in (
        ("generate", model, *ASK, *wide),
        ("chat", model, *wide),
        ("score", model, text, *wide),
    ):
        found = re.fullmatch(REFUSAL, one_line(*command, stdin="Hello\n"))
        # One layer of one head: 2 of 16 float32 a token.
        assert found is not None and found.groups() == ("0.1", "1,280.0", "536.9")
    assert done("generate", model, *ASK, "--window", 1000).err == ""


# --- the real program ---


@pytest.mark.parametrize("wrong", [["generate", "./nowhere", "-p", "x"], ["chat", "org/name"]])
def test_the_program_says_the_same_one_line(wrong: list[str]) -> None:
    found = subprocess.run(program(*wrong), capture_output=True, text=True, timeout=DEADLINE)
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr == f"mlx_stream: {one_line(*wrong)}\n"


# --- a device that fails ---


def test_a_gpu_that_fails_late_is_one_line_and_our_own_mistakes_are_not(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = ["[METAL] Command buffer execution failed:\nCaused GPU Timeout Error."]

    def late(*_: object, **__: object) -> int:
        raise RuntimeError(said[0])

    monkeypatch.setattr("mlx_stream.generate.token_stream.as_int", late)
    result = run("generate", tiny, *ASK, "--max-tokens", 5)
    assert result.code == 1
    assert result.err == (
        "mlx_stream: the device failed: [METAL] Command buffer execution failed: Caused GPU "
        "Timeout Error.: start again, with a smaller --window if it recurs\n"
    )
    said[0] = "dictionary changed size during iteration"
    with pytest.raises(RuntimeError, match="changed size"):
        done("generate", tiny, *ASK, "--max-tokens", 5)
