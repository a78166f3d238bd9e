"""`chat -p`: one question, with a pipe, a file, or files that it names; and lines read as turns."""

import subprocess
import time

import pytest

from mlx_stream.cli.attach import attach_files, naming
from mlx_stream.errors import TextError
from tests.fakes.shell import DEADLINE, GREEDY, done, program, run

OPTIONS = (*GREEDY, "--max-tokens", 8)


def test_one_question_is_answered_with_the_models_text_and_nothing_else(letters):
    answered = done("chat", letters, *OPTIONS, "-p", "Hello")
    assert answered.out == done("chat", letters, *OPTIONS, stdin="Hello\n").out
    assert len(answered.out) == 9 and answered.err == ""


def test_standard_input_is_put_after_the_question(letters):
    piped = done("chat", letters, *OPTIONS, "--session", "one", "-p", "Sum up:", stdin="a\n\nb\n")
    assert len(piped.out) == 9
    assert "Sum up:\n\na\n\nb" in done("sessions", "show", "one").out
    refused = run("chat", letters, *OPTIONS, "-p", "Sum up:", stdin=b"\xff")
    assert refused.code == 1 and "standard input: is not UTF-8" in refused.err


def test_a_pipe_that_stays_silent_is_noticed(letters):
    command = program("chat", letters, *OPTIONS, "-p", "Sum up:")
    with subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True) as process:
        assert process.stdin and process.stderr
        begun = time.monotonic()
        assert "waiting for standard input" in process.stderr.readline()
        assert 2 < time.monotonic() - begun < DEADLINE
        out, _ = process.communicate("text", timeout=DEADLINE)
    assert process.returncode == 0 and len(out) == 9


def test_more_than_twenty_lines_are_turns_with_a_notice(letters):
    many = "Hi\n" * 21
    assert "-p TEXT" not in done("chat", letters, *OPTIONS, stdin="Hi\n" * 20).err
    noticed = done("chat", letters, *OPTIONS, stdin=many)
    assert noticed.err.count("-p TEXT") == 1 and noticed.out.count("\n") == 21
    assert "-p TEXT" not in done("chat", letters, *OPTIONS, "--lines", stdin=many).err
    refused = run("chat", letters, "--lines", "-p", "Hi")
    assert refused.code == 1 and "--lines and -p" in refused.err


def test_files_that_a_question_names_are_part_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("Buy milk.")
    (tmp_path / "my list.md").write_text("- eggs")
    notices = []
    asked = attach_files('Join @notes.txt, @"my list.md" and @notes.txt.', notices.append)
    assert asked == (
        'Join @notes.txt, @"my list.md" and @notes.txt.\n\nnotes.txt:\n\nBuy milk.\n\n'
        "my list.md:\n\n- eggs"
    )
    assert notices == [
        "notes.txt is part of the question: 9 characters",
        "my list.md is part of the question: 6 characters",
    ]
    for text in ("Ask @nobody", "me@notes.txt", "@", "@/", "Is it 2 @ 3.5?", "@1.5", "no file"):
        assert attach_files(text, pytest.fail) == text
    assert naming("notes.txt") == "@notes.txt " and naming("'my list.md'") == '@"my list.md" '


@pytest.mark.parametrize("name", ["nots.txt", "./nots", "~nobody/x", "/nots", '"my nots"'])
def test_a_file_that_does_not_exist_is_said(name):
    notices = []
    assert attach_files(f"Sum up @{name}, please", notices.append) == f"Sum up @{name}, please"
    shown = name.strip('"')
    assert notices == [f"there is no file {shown}: the question is sent as it is"]


@pytest.mark.parametrize("data", [b"\xff\xfe", b"a\0b", b""])
def test_what_is_not_a_text_file_is_refused(tmp_path, data):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(TextError):
        attach_files(f"Read @{tmp_path}/file", pytest.fail)
    with pytest.raises(TextError):
        naming(str(tmp_path / "nothing"))
