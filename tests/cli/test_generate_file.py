"""`generate --file`: every prompt is completed once, in order, even after a kill."""

import json
import signal
import subprocess
import time

import pytest

import mlx_stream
from mlx_stream.sampling import Sampling
from tests.fakes.shell import DEADLINE, done, program, run

PROMPTS = [f"{number} and the man of the house " * (1 + number % 5) for number in range(24)]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps(text if at % 2 else {"prompt": text}) for at, text in enumerate(PROMPTS)]
    path.write_text("\n".join(lines) + "\n\n", "utf-8")
    return path


def options(letters, prompts, out, *more):
    return ["generate", letters, "--file", prompts, "--out", out, "--temp", 0, *more]


def replies(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def one_by_one(letters, count):
    model = mlx_stream.load(letters, dtype="float32", keep_quantized=False)
    for line, prompt in enumerate(PROMPTS, 1):
        pieces = [*mlx_stream.stream(model, prompt, count, Sampling(0), window=60)]
        text = "".join(piece.text for piece in pieces)
        yield {"line": line, "text": text, "finish": pieces[-1].finish}


@pytest.mark.parametrize("streams", [1, 5])
def test_replies_are_those_of_one_by_one(letters, prompts, tmp_path, streams):
    out = tmp_path / "replies.jsonl"
    more = ("--streams", streams, "--max-tokens", 20, "--window", 60)
    done(*options(letters, prompts, out, *more))
    assert replies(out) == [*one_by_one(letters, 20)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.jsonl", "replies.jsonl"]


def test_a_run_that_is_killed_twice_continues(letters, prompts, tmp_path):
    out, log = tmp_path / "replies.jsonl", tmp_path / "replies.jsonl.part"
    words = options(letters, prompts, out, "--max-tokens", 150, "--window", 60, "--streams", 3)
    for least in (3, 7):  # the first line of a log is its header
        running = subprocess.Popen(program(*words), stderr=subprocess.DEVNULL)
        until = time.monotonic() + DEADLINE
        while not log.exists() or log.read_bytes().count(b"\n") < least:
            assert time.monotonic() < until and running.poll() is None
        running.send_signal(signal.SIGKILL)
        running.wait(DEADLINE)
        assert not out.exists()
    before = log.read_bytes().splitlines()[1:7]
    done(*words)
    found = replies(out)
    assert found == [*one_by_one(letters, 150)]
    assert all(json.loads(line) in found for line in before)


def test_other_prompts_or_settings_do_not_continue_a_log(letters, prompts, tmp_path):
    out = tmp_path / "replies.jsonl"
    words = options(letters, prompts, out, "--max-tokens", 5)
    done(*words)
    finished = "already exists: it is from a finished run, with 24 replies: choose another --out"
    assert finished in run(*words).err
    out.write_text(out.read_text("utf-8").rpartition('{"line"')[0], "utf-8")
    assert "already exists: choose another --out" in run(*words).err
    out.rename(tmp_path / "kept")
    log = tmp_path / "replies.jsonl.part"
    running = subprocess.Popen(
        program(*options(letters, prompts, out, "--max-tokens", 200, "--streams", 1)),
        stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + DEADLINE
    while not log.exists() or log.read_bytes().count(b"\n") < 2:
        assert time.monotonic() < until and running.poll() is None
    running.kill()
    running.wait(DEADLINE)
    for other in (words, options(letters, prompts, out, "--max-tokens", 200, "--seed", 3)):
        assert "run with different settings" in run(*other).err
    prompts.write_text(prompts.read_text("utf-8").replace("man", "men"), "utf-8")
    refused = run(*options(letters, prompts, out, "--max-tokens", 200))
    assert refused.code == 1 and "different settings: prompts" in refused.err


def test_a_log_whose_first_line_was_cut_is_begun_again(letters, prompts, tmp_path):
    out = tmp_path / "replies.jsonl"
    (tmp_path / "replies.jsonl.part").write_text('{"log": "mlx_stream log", "vers')
    done(*options(letters, prompts, out, "--max-tokens", 5))
    assert len(replies(out)) == len(PROMPTS)


def test_a_prompt_that_cannot_be_completed_has_an_error_in_its_line(letters, tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    prompts.write_text('"Hello"\n\n"\\ud800"\n"And?"\n')
    found = run(*options(letters, prompts, out, "--max-tokens", 5))
    assert found.code == 1 and "1 of 3 prompts failed" in found.err
    assert [row["line"] for row in replies(out)] == [1, 3, 4]
    assert ["error" in row for row in replies(out)] == [False, True, False]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "is empty"),
        ("\n\n", "contains no prompts"),
        ('"a"\n{"text": "b"}\n', "line 2: neither a JSON string"),
        ('"a"\nb\n', "line 2"),
        ('""\n', "line 1"),
        ("[1]\n", "line 1"),
        ("[" * 100_000, "line 1"),
    ],
    ids=["empty", "blank", "object", "text", "nothing", "list", "deep"],
)
def test_a_file_without_prompts_is_refused(letters, tmp_path, text, match):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    found = run(*options(letters, path, tmp_path / "out"))
    assert found.code == 1 and match in found.err and found.err.count("\n") == 1
    assert [one.name for one in tmp_path.iterdir()] == ["prompts.jsonl"]


@pytest.mark.parametrize("streams", [0, 65])
def test_streams_out_of_range_are_refused(letters, prompts, tmp_path, streams):
    found = run(*options(letters, prompts, tmp_path / "out", "--streams", streams))
    assert found.code == 1 and f"--streams must be from 1 to 64, not {streams}" in found.err


def test_a_prompt_and_a_file_exclude_each_other(letters, prompts):
    assert run("generate", letters, "-p", "x", "--file", prompts).code == 2
    assert run("generate", letters).code == 2
    assert run("generate", letters, "--file", prompts).code == 2


def test_no_other_file_is_touched(letters, tmp_path):
    """This holds for a file named like a partial one, and for a dangling symlink."""
    prompts, link = tmp_path / "in.new", tmp_path / "link"
    prompts.write_text('"a"\n')
    done(*options(letters, prompts, tmp_path / "in", "--max-tokens", 2))
    assert prompts.read_text() == '"a"\n' and len(replies(tmp_path / "in")) == 1
    link.symlink_to(tmp_path / "nowhere")
    refused = run(*options(letters, prompts, link))
    assert refused.code == 1 and "already exists" in refused.err and link.is_symlink()
