"""Only one process at a time has a session open; where sessions are stored."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mlx_stream
from mlx_stream.chat.session_files import session_names, session_paths
from mlx_stream.chat.summaries import latest_session
from mlx_stream.program.lock import Lock
from mlx_stream.program.paths import cache_folder, data_folder, private
from tests.chat.test_store import refusal

# The package is a stand-in, because importing the real one takes longer than the test.
PROGRAM = f"""
import os, sys, time, types
from pathlib import Path
package = types.ModuleType("mlx_stream")
package.__path__ = {mlx_stream.__path__!r}
sys.modules["mlx_stream"] = package
from mlx_stream.errors import SessionError
from mlx_stream.program.lock import Lock
path = Path(sys.argv[1])
"""
HOLD = """
lock = Lock.acquire(path)
print("held", flush=True)
sys.stdin.read()
"""
# Takes a lock, and sometimes removes its file while holding it; a marker shows whether two
# processes hold it at once.
FIGHT = """
marker, end, times = path.with_name("marker"), time.monotonic() + float(sys.argv[2]), 0
while time.monotonic() < end:
    try:
        lock = Lock.acquire(path)
    except SessionError:
        continue
    os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    times += 1
    marker.unlink()
    if times % 2:
        path.unlink()
    lock.close()
print(times)
"""


def started(program: str, *args: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM + program, *map(str, args)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def held_by(program: subprocess.Popen[str]) -> None:
    assert program.stdout is not None and program.stdout.readline() == "held\n"


def test_the_refusal_names_the_process_that_holds_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "my.talk.lock"
    with started(HOLD, path) as process:
        held_by(process)
        line = refusal(Lock.acquire, path)
        process.kill()
    time_of_day = re.fullmatch(
        rf"session 'my.talk' is open in process {process.pid} since (\d\d:\d\d): "
        "close it there first, or use another name",
        line,
    )
    minutes = [time.strftime("%H:%M", time.localtime(time.time() - s)) for s in (0, 60)]
    assert time_of_day and time_of_day[1] in minutes
    assert process.returncode == -signal.SIGKILL
    # The process died, which released its lock.
    with Lock.acquire(path):
        assert f"process {os.getpid()} since" in refusal(Lock.acquire, path)
    Lock.acquire(path).close()
    assert path.stat().st_mode & 0o777 == 0o600 and path.read_bytes() == b""


def test_a_lock_that_is_removed_while_others_wait_is_one_lock(tmp_path: Path) -> None:
    programs = [started(FIGHT, tmp_path / "x.lock", 1.0) for _ in range(3)]
    results = [program.communicate() for program in programs]
    assert [err for _, err in results] == [""] * 3
    assert sum(int(out) for out, _ in results) > 50


@pytest.mark.parametrize(
    "note", [b"", b"\xff\0", b"1", b"a b", b"1 2 3", b"9" * 5000, b"\x1b[31m 2026", b"5 9999-99-99"]
)
def test_a_note_that_says_nothing(tmp_path: Path, note: bytes) -> None:
    path = tmp_path / "x.lock"
    with Lock.acquire(path):
        path.write_bytes(note)
        assert refusal(Lock.acquire, path).startswith("session 'x' is open in another process: ")
        path.write_bytes(b"12 2020-01-02T03:04:05+00:00 ")
        assert re.search(
            r"process 12 since 20\d\d-\d\d-\d\d \d\d:\d\d: ", refusal(Lock.acquire, path)
        )


def test_a_link_pipe_or_folder_cannot_be_a_lock(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    path.symlink_to(tmp_path / "elsewhere")
    assert "cannot be locked" in refusal(Lock.acquire, path)
    assert not (tmp_path / "elsewhere").exists()
    path.unlink()
    os.mkfifo(path)
    assert "not a file" in refusal(Lock.acquire, path)
    path.unlink()
    path.mkdir()
    assert "cannot be locked" in refusal(Lock.acquire, path)
    assert "cannot create this folder" in refusal(Lock.acquire, Path("/dev/null/x/y.lock"))


# --- where sessions are stored ---


@pytest.mark.parametrize("name", ["a", "_", "A-z_0.9", "9", "x" * 64, "a.db", "a..b", "con"])
def test_names(name: str) -> None:
    found = session_paths(name)
    assert found.database.parent == found.lock.parent == data_folder()
    assert found.database.stem == found.lock.stem == found.snapshot.stem == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".a", "-a", "a/b", "a b", "a\n", "é", "x" * 65, "a\0", "\ud800", "x" * 9999],
    ids=lambda name: ascii(name)[:20],
)
def test_names_that_cannot_be(name: str) -> None:
    assert "is not a valid session name; expected" in refusal(session_paths, name)


def test_folders_are_only_its_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "new" / "home"
    monkeypatch.setenv("MLX_STREAM_HOME", str(home))
    assert (data_folder(), cache_folder()) == (home / "sessions", home / "snapshots")
    assert session_names() == [] and latest_session() is None and not home.exists()
    for folder in (data_folder(), cache_folder()):
        assert private(folder).stat().st_mode & 0o777 == 0o700
        folder.chmod(0o755)
        assert private(folder).stat().st_mode & 0o777 == 0o700
    other = tmp_path / "other"
    other.mkdir(mode=0o755)
    assert private(other).stat().st_mode & 0o777 == 0o755
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLX_STREAM_HOME", str(tmp_path / "file"))
    assert "set MLX_STREAM_HOME" in refusal(private, data_folder())
    assert "cannot be read" in refusal(session_names)


def test_sessions_are_listed_by_name() -> None:
    folder = private(data_folder())
    for name in ("b.db", "a.db", "c.d.db", ".x.db.new", ".x.db", "-.db", "a.lock", "é.db"):
        (folder / name).touch()
    (folder / "a.db-wal").touch()
    (folder / "link.db").symlink_to(folder / "a.db")
    (folder / "folder.db").mkdir()
    assert session_names() == ["a", "b", "c.d"] and latest_session() is None  # all are damaged


def test_a_lock_ends_once(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    first = Lock.acquire(path)
    first.close()
    with Lock.acquire(path):
        first.close()
        refusal(Lock.acquire, path)


def test_folders_without_a_home_of_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLX_STREAM_HOME")
    for folder in (data_folder(), cache_folder()):
        assert folder.is_absolute() and folder.parts[-2:] == ("mlx_stream", "sessions")
