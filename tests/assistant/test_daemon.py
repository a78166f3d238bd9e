"""The assistant as a program: when it is killed, stopped, sent requests, or given bad input."""

import os
import random
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import pytest

import mlx_stream
from mlx_stream_assistant.errors import AssistantError
from mlx_stream_assistant.journal import Journal
from mlx_stream_assistant.paths import AGENT, assistant_paths
from tests.fakes.assistants import Running, Watch, asked, entries, has_caught_up, told
from tests.fakes.tiny import tiny_config, write_letters

KILLS = 3
SYSTEM = "Be brief."
WINDOW = 400


@pytest.fixture(scope="module")
def letters(tmp_path_factory) -> Path:
    """Return the folder of a model that writes letters; its context has room for a window."""
    config = tiny_config(max_position_embeddings=512)
    return write_letters(tmp_path_factory.mktemp("assistant") / "letters", config)


@pytest.fixture(autouse=True)
def home(monkeypatch):
    """Give the assistant a home with a short path, which a socket needs."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setenv("MLX_STREAM_HOME", folder)
        yield Path(folder)


@pytest.fixture
def log(tmp_path) -> Path:
    """Return the file that the assistant follows."""
    path = tmp_path / "x.log"
    path.touch()
    return path


@pytest.fixture
def start(letters, tmp_path):
    """Return a function that starts an assistant; those still running are killed at the end."""
    running = []

    def start(*words: object, **more) -> Running:
        options = (f"--model={letters}", f"--window={WINDOW}", f"--system={SYSTEM}")
        running.append(Running((*options, *words), tmp_path / "said", **more))
        return running[-1]

    yield start
    for one in running:
        one.process.kill()
        one.process.wait()


def prose(count: int, seed: int = 1) -> str:
    """Return lines, no two of them the same."""
    luck = random.Random(seed)
    words = ("the", "and he", "said", "in of", "a hat,", "that", "Wh€n?", "<|im_end|>", "then")
    return "".join(f"{n} {' '.join(luck.choices(words, k=9))}\n" for n in range(count))


def read_whole(model: Path, texts: list[str]) -> tuple[int, int]:
    """Return how many tokens a listener attends to and has evicted if fed everything in one go."""
    with mlx_stream.Engine(str(model), queue_size=10_000) as engine:
        listener = engine.listen(system=SYSTEM, window=WINDOW)
        for text in texts:
            listener.feed(text, timeout=60)
        while listener.backlog:
            time.sleep(0.01)
        return listener.stats.attended, listener.stats.evicted


# --- kills ---


def test_killed_again_and_again_it_reads_everything_once(start, letters, log, tmp_path):
    """A quick version of `tests.long.assistant`."""
    luck, diary, text = random.Random(7), tmp_path / "diary.md", prose(200).encode()
    watch = Watch(assistant_paths("main").journal)
    words = (f"--follow={log}", f"--notes={diary}", "--snapshot-every=0.005")
    pieces = [text[at : at + 500] for at in range(0, len(text), 500)]
    ends = sorted(luck.sample(range(len(pieces)), KILLS))
    assistant = start(*words)
    for number, piece in enumerate(pieces):
        with log.open("ab") as file:
            file.write(piece)
        if number in ends:
            assistant.until(lambda status: status["state"] == "reading")
            delay = luck.uniform(0, 1.5)
            with pytest.raises(subprocess.TimeoutExpired):
                assistant.process.wait(delay)
            assistant.kill()
            watch.look()
            assistant = start(*words)
    status = assistant.until_read(len(text))
    note = asked("note")["note"]
    assert entries(diary) == [note] and "evicted" in note
    assistant.stop()
    watch.look()
    assert watch.text(log) == text.decode()
    source = Journal(assistant_paths("main").journal).source(str(log))
    assert source and (source.bytes, source.crc) == (len(text), zlib.crc32(text))
    assert (status["attended"], status["evicted"]) == read_whole(letters, watch.fed)


def test_a_stop_saves_the_stream_and_a_start_resumes_it(start, log):
    log.write_text(prose(60))
    assistant = start(f"--follow={log}")
    before = assistant.until_read(log.stat().st_size)
    assistant.stop()
    assert assistant_paths("main").snapshot.exists() and not assistant_paths("main").socket.exists()
    assistant = start(f"--follow={log}")
    status = assistant.until(has_caught_up)
    assert status["chunks_saved"] == before["chunks_fed"]
    assert (status["attended"], status["evicted"]) == (before["attended"], before["evicted"])
    assert "built again" not in assistant.said
    assert asked("stop")["pid"] == assistant.process.pid
    assert assistant.process.wait(60) == 0


def test_a_file_and_a_folder_may_be_followed_under_other_names(start, log, tmp_path):
    folder = tmp_path / "notes"
    folder.mkdir()
    log.write_text(prose(20))
    (folder / "a.md").write_text(prose(20, 2))
    size = len((prose(20) + prose(20, 2)).encode())
    assistant = start(f"--follow={log}", f"--folder={folder}")
    assistant.until_read(size)
    assistant.stop()
    log.rename(tmp_path / "y.log")
    folder.rename(tmp_path / "notes of 2026")
    with (tmp_path / "y.log").open("a") as file:
        file.write("more\n")
    words = (f"--follow={tmp_path / 'y.log'}", f"--folder={tmp_path / 'notes of 2026'}")
    assert start(*words).until_read(size + 5)["bytes_read"] == size + 5


def test_without_its_snapshot_a_stream_is_built_again(start, log):
    log.write_text(prose(60))
    assistant = start(f"--follow={log}")
    before = assistant.until_read(log.stat().st_size)
    assistant.stop()
    where = assistant_paths("main")

    def damage() -> None:
        data = bytearray(where.snapshot.read_bytes())
        data[-1] ^= 1
        where.snapshot.write_bytes(data)

    def rename_the_journal() -> None:
        with Journal(where.journal)._connection as connection:
            connection.execute("UPDATE about SET id = 'x'")

    spoils = (where.snapshot.unlink, damage, rename_the_journal, lambda: None)
    for count, spoil in enumerate(spoils, 1):
        spoil()
        words = ("--window=300",) if count == 4 else ()
        assistant = start(f"--follow={log}", *words)
        status = assistant.until(has_caught_up)
        assert assistant.said.count("is being rebuilt from the latest") == count
        assert status["bytes_read"] == before["bytes_read"]
        assert status["attended"] == before["attended"] - (100 if words else 0)
        assistant.stop()
    assert "Traceback" not in assistant.said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_it_continues_when_its_log_cannot_be_written(start, log):
    with Path("/dev/full").open("w") as full:
        running = start(f"--follow={log}", stderr=full)
    log.write_text(prose(20))
    running.until_read(log.stat().st_size)
    log.unlink()
    time.sleep(4.5)  # until it reports the missing file
    log.write_text(prose(10))
    running.until_read(log.stat().st_size)
    running.stop()


# --- a device that fails ---


def test_after_a_step_that_failed_it_resumes_from_its_snapshot(start, letters, log, tmp_path):
    fail = tmp_path / "fail"
    words = (f"--follow={log}", "--snapshot-every=0.005")
    assistant = start(*words, program=("-m", "tests.fakes.failing", fail))
    text, watch = prose(120), Watch(assistant_paths("main").journal)
    parts = text[:2_000], text[2_000:]
    log.write_text(parts[0])
    assistant.until_read(len(parts[0].encode()))
    fail.touch()
    with log.open("a") as file:
        file.write(parts[1])
    status = assistant.until_read(len(text.encode()))
    assert not fail.exists()
    assert "file.; the stream resumes from its latest snapshot" in assistant.said
    watch.look()
    assert (status["attended"], status["evicted"]) == read_whole(letters, watch.fed)
    fail.touch()
    with log.open("a") as file:
        file.write(prose(20))
    assistant.until(lambda status: status["state"] == "waiting")
    assert "latest snapshot in 10 minutes" in assistant.said and "Traceback" not in assistant.said
    assert assistant.stop() < 2
    assistant = start(*words)
    assistant.until_read(log.stat().st_size)
    watch.look()
    assert watch.text(log) == log.read_text()


# --- requests ---


def test_questions_leave_the_stream_as_it_is(start, log, tmp_path):
    diary = tmp_path / "diary.md"
    log.write_text(prose(60))
    assistant = start(f"--follow={log}", f"--notes={diary}")
    before = assistant.until_read(log.stat().st_size)
    answer = told("ask", "What was said?")
    assert answer.returncode == 0 and answer.stdout.strip().isalpha()
    assert "answered from text read since 20" in answer.stderr and "reading" not in answer.stderr
    noted = told("note")
    assert noted.returncode == 0 and noted.stdout.startswith("## 20")
    assert [entry.strip() for entry in entries(diary)] == [noted.stdout.strip()]
    again = told("note")
    assert again.returncode == 0 and again.stdout == "" and "nothing new since" in again.stderr
    status = assistant.status()
    for key in ("attended", "evicted", "bytes_read", "chunks_fed"):
        assert status[key] == before[key]
    shown = told("status").stdout
    assert f"{status['attended']:,} tokens, window {WINDOW}" in shown
    assert f"{log}: at byte {log.stat().st_size:,} of" in shown and "MB resident" in shown
    answer = asked("ask", question="And?", remember=True)["text"]
    after = assistant.until(lambda s: s["chunks_fed"] > before["chunks_fed"] and has_caught_up(s))
    assert after["chunks_fed"] == before["chunks_fed"] + 1
    assert after["evicted"] > before["evicted"]
    assistant.stop()
    *_, last = Journal(assistant_paths("main").journal).chunks(0)
    assert last.source == "asked" and last.text == f"Question: And?\nAnswer: {answer.strip()}\n"


def test_a_note_is_written_every_so_often(start, log, tmp_path):
    diary = tmp_path / "diary.md"
    log.write_text(prose(5))
    assistant = start(f"--follow={log}", f"--notes={diary}", "--every=0.02")
    assistant.until(lambda status: status["last_note"])
    assistant.until(lambda status: len(entries(diary)) == 1)
    log.write_text(prose(9))
    assistant.until(lambda status: len(entries(diary)) == 2)
    assistant.stop()


def test_input_folder_and_files_at_once(start, log, tmp_path):
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "a.md").write_text("A note.\n")
    diary = folder / "diary.md"
    log.write_text("A line.\n")
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as cat:
        assert cat.stdin and cat.stdout
        sources = (f"--follow={log}", f"--folder={folder}", "--stdin", f"--notes={diary}")
        assistant = start(*sources, stdin=cat.stdout)
        cat.stdin.write("Typed: €.\n".encode())
        cat.stdin.flush()
        assistant.until_read(len("A note.\nA line.\nTyped: €.\n".encode()))
        assert asked("note")["note"]
        cat.stdin.close()
        status = assistant.until(lambda status: status["sources"][2]["ended"])
    assert status["sources"][1]["notes"] == 1  # the diary is not read
    assistant.stop()
    chunks = list(Journal(assistant_paths("main").journal).chunks(0))
    assert sorted(chunk.text for chunk in chunks) == ["A line.\n", "A note.\n", "Typed: €.\n"]
    assert all(chunk.head for chunk in chunks)


# --- without a network ---

NO_NETWORK = """
import socket
made = socket.socket.__new__
class Denied(socket.socket):
    def __init__(self, family=-1, *more, **others):
        if family != socket.AF_UNIX:
            print("NETWORK", flush=True)
            raise OSError("no network for this process")
        super().__init__(family, *more, **others)
socket.socket = Denied
"""


def test_it_works_in_a_process_without_a_network(start, log, tmp_path):
    log.write_text(prose(20))
    (tmp_path / "denied").mkdir()
    (tmp_path / "denied" / "sitecustomize.py").write_text(NO_NETWORK)
    path = os.pathsep.join([str(tmp_path / "denied"), os.environ.get("PYTHONPATH", "")])
    denied = {"PYTHONPATH": path}
    code = "import socket; socket.socket(socket.AF_INET)"
    tried = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **denied}, capture_output=True, text=True
    )
    assert tried.returncode == 1 and "NETWORK" in tried.stdout
    diary = tmp_path / "diary.md"
    assistant = start(f"--follow={log}", f"--notes={diary}", environment=denied)
    assistant.until_read(log.stat().st_size)
    assert asked("ask", question="What?")["text"] and asked("note")["note"]
    assistant.stop()
    assert "NETWORK" not in assistant.said


# --- bad input ---


def refused(*words: object, status: int = 1, **more) -> str:
    """Run a command that fails with one line, and return that line."""
    done = told(*words, **more)
    assert done.returncode == status and done.stdout == "", (done.stdout, done.stderr)
    line = done.stderr.splitlines()[-1]
    assert line.startswith("assistant: ") and "Traceback" not in done.stderr
    return line


def test_what_keeps_it_from_starting_is_one_line(letters, log, tmp_path):
    model = f"--model={letters}"
    assert "nothing to read: pass" in refused("run")
    assert "model: " in refused("run", f"--follow={log}", f"--model={tmp_path / 'model'}")
    tmp_path.joinpath("folder").mkdir()
    line = refused("run", f"--follow={log}", model, f"--notes={tmp_path / 'folder'}")
    assert "folder: cannot write notes" in line
    line = refused("run", f"--follow={log}", model, "--window=99999")
    assert "99,999" in line or "99999" in line
    assert "is not running" in refused("ask", "Who?")
    assert "is not running" in refused("status")
    where = assistant_paths("main")
    where.journal.write_bytes(b"not a journal " * 100)
    assert "from a backup" in refused("run", f"--follow={log}", model)
    assert "nothing" not in refused("run", f"--follow={log}", model, "--name=../x")
    # launchd restarts a program that does not exit with status 0.
    agent = {"env": {**os.environ, AGENT: "1"}}
    assert "from a backup" in refused("run", f"--follow={log}", model, status=0, **agent)


def test_only_one_of_a_name_runs(start, log):
    assistant = start(f"--follow={log}")
    assistant.until(lambda status: status["state"] == "reading")
    assert "already running" in refused("run", f"--follow={log}")
    assert asked("status")["pid"] == assistant.process.pid
    with pytest.raises(AssistantError, match="question is missing"):
        asked("ask", question=" ")
    with pytest.raises(AssistantError, match="no file for notes"):
        asked("note")
    with pytest.raises(AssistantError, match="must be status, stop"):
        asked("everything")
    assistant.kill()
    assistant = start(f"--follow={log}")  # despite the socket left behind
    assistant.until(lambda status: status["state"] == "reading")
    assistant.stop()


def test_it_reads_on_past_sources_that_cannot_be_read(start, log, tmp_path):
    binary, gone, loop = tmp_path / "binary", tmp_path / "gone", tmp_path / "loop"
    binary.write_bytes(bytes(range(256)) * 16)
    loop.symlink_to(loop)
    log.write_text("One.\n")
    sources = [f"--follow={path}" for path in (binary, gone, loop, log)]
    assistant = start(*sources, f"--folder={loop}", f"--folder={log}")
    assistant.until_read(len("One.\n"))
    for line in (
        f"{binary}: is not UTF-8 text",
        f"{gone}: does not exist; waiting",
        f"{loop}: cannot be read: Too many levels",
        f"{log}: cannot be read: it is a file (use --follow)",
    ):
        assert assistant.said.count(line) == (2 if "levels" in line else 1)
    log.unlink()
    gone.write_text("Two.\n")
    assistant.until_read(len("One.\nTwo.\n"))
    log.write_text("Three.\n")
    assistant.until_read(len("One.\nTwo.\nThree.\n"))
    assistant.stop()


def test_notes_that_can_no_longer_be_written_are_kept(start, log, tmp_path):
    diary = tmp_path / "sub" / "diary.md"
    log.write_text("One.\n")
    assistant = start(f"--follow={log}", f"--notes={diary}")
    assistant.until_read(len("One.\n"))
    diary.unlink()
    diary.mkdir()
    with pytest.raises(AssistantError, match="cannot write notes"):
        asked("note")
    log.write_text("One.\nTwo.\n")
    assistant.until_read(len("One.\nTwo.\n"))
    diary.rmdir()
    assert asked("note")["note"]
    assert len(entries(diary)) == 1
    assistant.stop()
