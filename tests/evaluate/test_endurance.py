"""A run that is stopped, killed or out of disk space continues, and ends like any other."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mlx_stream
from tests.fakes.refusals import one_line
from tests.fakes.shell import DEADLINE, done, parsed, program

SEGMENT = 64
SETTINGS = ("--window", 30, "--segment", SEGMENT, "--chunk", 24)
# Figures that depend on the clock or the machine's memory.
MEASURED = ("tokens_per_second", "resident_bytes", "active_bytes")
Command = Callable[..., tuple[object, ...]]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("texts")
    paths = [folder / "one.txt", folder / "two.txt"]
    for path, times in zip(paths, (9, 14), strict=True):
        path.write_text(f"The man {path.stem} sat in the shade with the other one.\n" * times)
    return paths


@pytest.fixture
def endurance(tiny: Path, texts: list[Path], tmp_path: Path) -> Command:
    """Return a function that makes a command from a log's name, a segment count and options."""

    def command(log: str, segments: float, *more: object) -> tuple[object, ...]:
        tokens = ("--tokens", int(segments * SEGMENT))
        return (
            "eval",
            "endurance",
            tiny,
            *texts,
            "--log",
            tmp_path / log,
            *SETTINGS,
            *tokens,
            *more,
        )

    return command


def results(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a log after the first, without measured figures."""
    lines = [json.loads(line) for line in path.read_text().splitlines(True) if line[-1] == "\n"]
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines[1:]]


def test_the_log_has_each_segment_and_the_last_tenth_is_compared_once(
    endurance: Command, tmp_path: Path
) -> None:
    report = parsed(done(*endurance("log", 19.1, "--json")).out)
    rows, log = report["rows"], (tmp_path / "log").read_text()
    assert [row["tokens"] for row in rows] == [SEGMENT * n for n in range(1, 21)]  # whole segments
    assert rows == [json.loads(x) for x in log.splitlines()[1:-1]]
    assert all(row["evicted"] == row["tokens"] - 34 for row in rows)
    # With a tiny model, a buffer that the allocator reuses may be a little too large.
    active = [row["active_bytes"] for row in rows]
    assert max(active) - min(active) <= 16_384
    assert report["notes"][0].startswith("active memory: ")
    fresh = report["about"]["fresh"]
    assert (fresh["from"], fresh["to"]) == (18 * SEGMENT, 20 * SEGMENT)
    assert fresh["perplexity"] == pytest.approx(fresh["stream_perplexity"], rel=0.3)
    assert parsed(done(*endurance("log", 20, "--json")).out) == report
    assert (tmp_path / "log").read_text() == log


def test_the_texts_are_read_over_and_over_again(
    endurance: Command, tiny: Path, texts: list[Path], tmp_path: Path
) -> None:
    done(*endurance("log", 30, "--no-fresh"))
    tokenizer = mlx_stream.load(tiny).tokenizer
    once = [id for path in texts for id in tokenizer.encode(path.read_text())]
    assert len(once) < 30 * SEGMENT < 4 * len(once)
    whole = tmp_path / "whole.txt"
    whole.write_text("".join(path.read_text() for path in texts) * 4)
    assert tokenizer.encode(whole.read_text()) == once * 4
    most = 30 * SEGMENT + 1
    scored = parsed(done("score", tiny, whole, "--window", 30, "--max-tokens", most, "--json").out)
    for row in results(tmp_path / "log"):
        losses = scored["nll"][row["tokens"] - SEGMENT : row["tokens"]]
        assert row["nll"] == pytest.approx(sum(losses) / SEGMENT, abs=1e-4)


def test_a_window_that_holds_all_is_its_own_fresh_stream(endurance: Command) -> None:
    settings = ("--window", 400, "--segment", 32, "--tokens", 320, "--json")
    fresh = parsed(done(*endurance("log", 1, *settings)).out)["about"]["fresh"]
    assert fresh["perplexity"] == pytest.approx(fresh["stream_perplexity"], rel=1e-4)


def start(*command: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        program(*command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_lines(path: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not path.exists() or path.read_bytes().count(b"\n") <= count:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_or_killed_it_continues_where_it_was(
    endurance: Command, tmp_path: Path, number: signal.Signals
) -> None:
    process = start(*endurance("parts", 3_000, "--save-every", 0.05, "--no-fresh"))
    wait_for_lines(tmp_path / "parts", 40, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=DEADLINE)
    logged = len(results(tmp_path / "parts"))
    if number != signal.SIGKILL:
        assert (process.returncode, out) == (130, "")
        assert "rerun the command to continue" in err
    assert 40 <= logged < 3_000, "it was stopped on its way"
    for more in (5, 5, 10):
        result = done(*endurance("parts", logged + more, "--no-fresh"))
        assert "again" not in result.err, "its state was used"
    assert re.search(r"parts: continuing from token [\d,]+\n", result.err)
    done(*endurance("whole", logged + 10, "--no-fresh"))
    assert results(tmp_path / "parts") == results(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["missing", "damaged", "of another log", "too far", "cut line"])
def test_without_a_state_it_reads_again_and_says_so(
    endurance: Command, tmp_path: Path, damage: str
) -> None:
    done(*endurance("whole", 9, "--no-fresh"))
    done(*endurance("log", 6, "--no-fresh"))
    log, state = tmp_path / "log", tmp_path / "log.state"
    match damage:
        case "missing":
            state.unlink()
        case "damaged":
            state.write_bytes(state.read_bytes()[:-9])
        case "of another log":
            done(*endurance("other", 6, "--no-fresh", "--sinks", 3))
            state.write_bytes((tmp_path / "other.state").read_bytes())
        case "too far":
            log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:5]))
        case "cut line":
            log.write_bytes(log.read_bytes()[:-20] + b"longer than what is to come" * 200)
    result = done(*endurance("log", 9, "--no-fresh"))
    assert "logged tokens again" in result.err
    assert results(log) == results(tmp_path / "whole")


FULL_DISK = """
import resource, signal, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
from mlx_stream.cli import main
sys.argv = ["mlx_stream", *sys.argv[2:]]
main()
"""


def test_a_full_disk_loses_nothing(endurance: Command, tmp_path: Path) -> None:
    done(*endurance("whole", 200, "--no-fresh"))
    # No file may grow beyond this: the state of the tiny model takes about 20,000 bytes.
    command = [str(word) for word in endurance("log", 200, "--no-fresh", "--save-every", 0)]
    command = [sys.executable, "-c", FULL_DISK, "24000", *command]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert (ended.returncode, ended.stdout) == (1, ""), ended.stderr
    log = tmp_path / "log"
    line = ended.stderr.splitlines()[-1]
    assert f"{log}: cannot be written: File too large; earlier lines are kept" in line
    assert "again" not in done(*endurance("log", 200, "--no-fresh")).err
    assert results(log) == results(tmp_path / "whole")


# --- refusals ---


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("--sinks", 3), "different settings: sinks (4, not 3); choose another file"),
        (("--segment", 32), "different settings: segment (64, not 32)"),
        (("--dtype", "float16"), "different settings: model; choose"),
        ((__file__,), "different settings: text; choose"),
    ],
)
def test_a_log_of_other_settings_is_left_alone(
    endurance: Command, tmp_path: Path, change: tuple[object, ...], named: str
) -> None:
    done(*endurance("log", 2, "--no-fresh"))
    before = (tmp_path / "log").read_bytes()
    assert named in one_line(*endurance("log", 3, *change))
    assert (tmp_path / "log").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        *(("log", text, "is not a log") for text in ("Dear diary\nI", "{}\n", "[1]\n", "\n")),
        ("log.state", "a novel", "the state would overwrite this file"),
    ],
)
def test_another_file_is_left_alone(
    endurance: Command, tmp_path: Path, name: str, content: str, why: str
) -> None:
    (tmp_path / name).write_text(content)
    assert why in one_line(*endurance("log", 1))
    assert (tmp_path / name).read_text() == content


def test_a_log_in_use(endurance: Command, tmp_path: Path) -> None:
    process = start(*endurance("log", 5_000, "--no-fresh"))
    try:
        wait_for_lines(tmp_path / "log", 1, process)
        line = one_line(*endurance("log", 1))
        assert line.endswith("another process is writing to this log")
    finally:
        process.kill()
        process.communicate(timeout=DEADLINE)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (("--log", "nowhere/log"), "cannot be opened"),
        (("--log", "."), "cannot be opened"),
        (("--tokens", 0), "--tokens must be at least 1, not 0"),
        (("--segment", 0), "--segment must be at least 1, not 0"),
        (("--chunk", 0), "--chunk must be at least 1, not 0"),
        (("--save-every", "nan"), "--save-every must be 0 or more seconds, not nan"),
    ],
)
def test_options_are_refused(
    endurance: Command, tmp_path: Path, change: tuple[object, ...], why: str
) -> None:
    assert why in one_line(*endurance("log", 1, *change))
    assert not (tmp_path / "log.state").exists()
