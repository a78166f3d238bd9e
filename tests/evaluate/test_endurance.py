"""A long reading that is stopped, killed or out of disk goes on, and ends as if it had not been."""

import json
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.refusals import one_line
from tests.fakes.shell import DEADLINE, done, parsed, program

SEGMENT = 64
SETTINGS = ("--window", 30, "--segment", SEGMENT, "--chunk", 24)
# Figures that a clock or the machine's memory decides.
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
    def command(log: str, *more: object) -> tuple[object, ...]:
        return ("eval", "endurance", tiny, *texts, "--log", tmp_path / log, *SETTINGS, *more)

    return command


def results(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log after the first, without what a clock decides."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines[1:]]


def test_the_log_says_what_each_segment_was(endurance: Command, tmp_path: Path) -> None:
    report = parsed(done(*endurance("log", "--tokens", 20 * SEGMENT, "--json")).out)
    rows = report["rows"]
    assert [row["tokens"] for row in rows] == [SEGMENT * n for n in range(1, 21)]
    assert rows == [json.loads(x) for x in (tmp_path / "log").read_text().splitlines()[1:-1]]
    assert all(row["evicted"] == row["tokens"] - 34 for row in rows)
    # Of a tiny model, a reused buffer of the allocator's may be a little too large.
    active = [row["active_bytes"] for row in rows]
    assert max(active) - min(active) <= 16_384
    assert report["notes"][0].startswith("active memory: ")
    assert report["about"]["fresh"]["to"] == 20 * SEGMENT


def test_the_texts_are_read_over_and_over_again(
    endurance: Command, tiny: Path, texts: list[Path], tmp_path: Path
) -> None:
    done(*endurance("log", "--tokens", 30 * SEGMENT, "--no-fresh"))
    import mlx_stream

    tokenizer = mlx_stream.load(tiny).tokenizer
    once = [id for path in texts for id in tokenizer.encode(path.read_text())]
    assert len(once) < 30 * SEGMENT < 4 * len(once)
    whole = tmp_path / "whole.txt"
    whole.write_text("".join(path.read_text() for path in texts) * 4)
    assert tokenizer.encode(whole.read_text()) == once * 4
    scored = parsed(
        done("score", tiny, whole, "--window", 30, "--max-tokens", 30 * SEGMENT + 1, "--json").out
    )
    for row in results(tmp_path / "log"):
        losses = scored["nll"][row["tokens"] - SEGMENT : row["tokens"]]
        assert row["nll"] == pytest.approx(sum(losses) / SEGMENT, abs=1e-4)


def test_more_tokens_go_on_from_the_end(endurance: Command, tmp_path: Path) -> None:
    done(*endurance("whole", "--tokens", 12 * SEGMENT, "--no-fresh"))
    for segments in (1, 5, 5, 12):
        done(*endurance("parts", "--tokens", segments * SEGMENT, "--no-fresh"))
    assert results(tmp_path / "parts") == results(tmp_path / "whole")


def test_the_last_segment_is_read_whole(endurance: Command, tmp_path: Path) -> None:
    done(*endurance("log", "--tokens", 2 * SEGMENT + 1, "--no-fresh"))
    assert len(results(tmp_path / "log")) == 3


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
def test_stopped_or_killed_it_goes_on_where_it_was(
    endurance: Command, tmp_path: Path, number: signal.Signals
) -> None:
    many = ("--tokens", 3_000 * SEGMENT, "--save-every", 0.05, "--no-fresh")
    process = start(*endurance("parts", *many))
    wait_for_lines(tmp_path / "parts", 40, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=DEADLINE)
    logged = len(results_of_whole_lines(tmp_path / "parts"))
    if number != signal.SIGKILL:
        assert (process.returncode, out) == (130, "")
        assert "the same command continues from there" in err
    assert 40 <= logged < 3_000, "it was stopped on its way"
    more = (logged + 10) * SEGMENT
    result = done(*endurance("parts", "--tokens", more, "--no-fresh"))
    assert "again" not in result.err, "its state was of use"
    assert re.search(r"parts: continuing from token [\d,]+\n", result.err)
    done(*endurance("whole", "--tokens", more, "--no-fresh"))
    assert results(tmp_path / "parts") == results(tmp_path / "whole")


def results_of_whole_lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)[1:]


@pytest.mark.parametrize("damage", ["missing", "damaged", "of another log", "too far"])
def test_without_a_state_it_reads_again_and_says_so(
    endurance: Command, tiny: Path, texts: list[Path], tmp_path: Path, damage: str
) -> None:
    done(*endurance("whole", "--tokens", 9 * SEGMENT, "--no-fresh"))
    done(*endurance("log", "--tokens", 6 * SEGMENT, "--no-fresh"))
    log, state = tmp_path / "log", tmp_path / "log.state"
    match damage:
        case "missing":
            state.unlink()
        case "damaged":
            state.write_bytes(state.read_bytes()[:-9])
        case "of another log":
            turned = ("eval", "endurance", tiny, *texts[::-1], *SETTINGS, "--no-fresh")
            done(*turned, "--log", tmp_path / "other", "--tokens", 6 * SEGMENT)
            state.write_bytes((tmp_path / "other.state").read_bytes())
        case "too far":
            log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:5]))
    result = done(*endurance("log", "--tokens", 9 * SEGMENT, "--no-fresh"))
    assert "logged tokens again" in result.err and "other bits" not in result.err
    assert results(log) == results(tmp_path / "whole")


def test_a_line_cut_short_is_taken_back(endurance: Command, tmp_path: Path) -> None:
    done(*endurance("whole", "--tokens", 8 * SEGMENT, "--no-fresh"))
    done(*endurance("log", "--tokens", 5 * SEGMENT, "--no-fresh"))
    log = tmp_path / "log"
    log.write_bytes(log.read_bytes()[:-20] + b"longer than what is to come" * 200)
    result = done(*endurance("log", "--tokens", 8 * SEGMENT, "--no-fresh"))
    assert results(log) == results(tmp_path / "whole"), result.err


def test_a_log_of_other_bits_is_noticed(endurance: Command, tmp_path: Path) -> None:
    done(*endurance("log", "--tokens", 4 * SEGMENT, "--no-fresh"))
    log = tmp_path / "log"
    lines = log.read_text().splitlines()
    lines[2] = json.dumps(json.loads(lines[2]) | {"nll": 1.0})
    log.write_text("\n".join(lines) + "\n")
    (tmp_path / "log.state").unlink()
    result = done(*endurance("log", "--tokens", 5 * SEGMENT, "--no-fresh"))
    assert "segment 1 gives other bits" in result.err
    assert json.loads(log.read_text().splitlines()[2])["nll"] == 1.0, "what was logged is kept"


FULL_DISK = """
import resource, signal, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
from mlx_stream.cli import main
sys.argv = ["mlx_stream", *sys.argv[2:]]
main()
"""


@pytest.mark.parametrize("room_for_state", [False, True])
def test_a_full_disk_loses_nothing(
    endurance: Command, tmp_path: Path, room_for_state: bool
) -> None:
    tokens = ("--tokens", 400 * SEGMENT, "--no-fresh")
    done(*endurance("whole", *tokens))
    log = tmp_path / "log"
    if not room_for_state:
        done(*endurance("log", "--tokens", SEGMENT, "--no-fresh"))
        (tmp_path / "log.state").unlink()
    # No file may grow beyond this: the state of the tiny model takes about 20,000 bytes.
    limit = 50_000 if room_for_state else 10_000
    command = [str(word) for word in endurance("log", *tokens)]
    ended = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(limit), *command],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (1, ""), ended.stderr
    line = ended.stderr.splitlines()[-1]
    assert f"{log}: cannot be written: File too large; what was logged before is kept" in line
    logged = results(log)
    assert 0 < len(logged) < 400 and log.read_bytes().endswith(b"\n")
    result = done(*endurance("log", *tokens))
    assert ("again" in result.err) != room_for_state
    assert results(log) == results(tmp_path / "whole")
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_the_last_tenth_of_a_fresh_stream_is_read_once(endurance: Command, tmp_path: Path) -> None:
    tokens = ("--tokens", 20 * SEGMENT, "--json")
    first = parsed(done(*endurance("log", *tokens)).out)
    before = (tmp_path / "log").read_bytes()
    assert parsed(done(*endurance("log", *tokens)).out) == first
    assert (tmp_path / "log").read_bytes() == before
    fresh = first["about"]["fresh"]
    assert (fresh["from"], fresh["to"]) == (18 * SEGMENT, 20 * SEGMENT)
    assert fresh["perplexity"] == pytest.approx(fresh["stream_perplexity"], rel=0.3)


def test_a_window_that_holds_all_is_its_own_fresh_stream(
    tiny: Path, texts: list[Path], tmp_path: Path
) -> None:
    settings = ("--window", 400, "--segment", 32, "--tokens", 320, "--json")
    report = parsed(
        done("eval", "endurance", tiny, *texts, "--log", tmp_path / "log", *settings).out
    )
    fresh = report["about"]["fresh"]
    assert fresh["perplexity"] == pytest.approx(fresh["stream_perplexity"], rel=1e-4)


# --- what is refused ---


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("--sinks", 3), "another sinks (4, not 3)"),
        (("--segment", 32), "another segment (64, not 32)"),
        (("--dtype", "float16"), "another model: choose"),
    ],
)
def test_a_log_of_other_settings(
    endurance: Command, tmp_path: Path, change: tuple[object, ...], named: str
) -> None:
    done(*endurance("log", "--tokens", 2 * SEGMENT, "--no-fresh"))
    before = (tmp_path / "log").read_bytes()
    line = one_line(*endurance("log", "--tokens", 3 * SEGMENT, *change))
    assert named in line and "choose another file" in line
    assert (tmp_path / "log").read_bytes() == before


def test_a_log_of_another_text(
    endurance: Command, tmp_path: Path, tiny: Path, texts: list[Path]
) -> None:
    done(*endurance("log", "--tokens", 2 * SEGMENT, "--no-fresh"))
    rest = ("--log", tmp_path / "log", *SETTINGS, "--tokens", 3 * SEGMENT)
    assert "another text: choose" in one_line("eval", "endurance", tiny, texts[1], *rest)


@pytest.mark.parametrize("content", ["Dear diary\nI", "{}\n", "[1]\n", '{"log": 1}', "\n"])
def test_a_file_that_is_no_log_is_left_alone(
    endurance: Command, tmp_path: Path, content: str
) -> None:
    (tmp_path / "log").write_text(content)
    assert "is not a log" in one_line(*endurance("log", "--tokens", SEGMENT))
    assert (tmp_path / "log").read_text() == content


def test_a_file_that_is_no_state_is_left_alone(endurance: Command, tmp_path: Path) -> None:
    mine = tmp_path / "log.state"
    mine.write_text("a novel")
    assert "the state goes there" in one_line(*endurance("log", "--tokens", SEGMENT))
    assert mine.read_text() == "a novel"


def test_a_log_in_use(endurance: Command, tmp_path: Path) -> None:
    process = start(*endurance("log", "--tokens", 5_000 * SEGMENT, "--no-fresh"))
    try:
        wait_for_lines(tmp_path / "log", 1, process)
        line = one_line(*endurance("log", "--tokens", SEGMENT))
        assert line.endswith("another process is writing this log")
    finally:
        process.kill()
        process.communicate(timeout=DEADLINE)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--log", "nowhere/log"), "cannot be opened"),
        (("--log", "."), "cannot be opened"),
        (("--tokens", 0), "--tokens must be at least 1, not 0"),
        (("--segment", 0), "--segment must be at least 1, not 0"),
        (("--chunk", 0), "--chunk must be at least 1, not 0"),
        (("--save-every", "nan"), "--save-every must be 0 or more seconds, not nan"),
        (("--segment", 100_000), "tokens are not 100,000 and one to predict"),
        (("--json", "--csv"), "--json and --csv both want standard output: choose one"),
    ],
)
def test_what_cannot_be_measured(
    endurance: Command, tmp_path: Path, change: tuple[object, ...], said: str
) -> None:
    assert said in one_line(*endurance("log", *change))
    assert not (tmp_path / "log.state").exists()
