"""Logs and states that were tampered with, and files that would be written over: all refused."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import mlx_stream
from mlx_stream.generate import snapshot
from mlx_stream.generate.token_stream import TokenStream
from tests.fakes.refusals import one_line
from tests.fakes.shell import done

SEGMENT = 64
SETTINGS = ("--window", 30, "--segment", SEGMENT, "--chunk", 24, "--no-fresh")
Command = Callable[..., tuple[object, ...]]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text("The man sat in the shade with the other one.\n" * 20)
    return path


@pytest.fixture
def endurance(tiny: Path, text: Path, tmp_path: Path) -> Command:
    def command(segments: int, *more: object) -> tuple[object, ...]:
        tokens = ("--tokens", segments * SEGMENT)
        return (
            "eval",
            "endurance",
            tiny,
            text,
            "--log",
            tmp_path / "log",
            *SETTINGS,
            *tokens,
            *more,
        )

    return command


@pytest.fixture
def log(endurance: Command, tmp_path: Path) -> Path:
    done(*endurance(4))
    return tmp_path / "log"


def change(log: Path, line: int, **changes: Any) -> None:
    lines = log.read_text().splitlines()
    value = {**json.loads(lines[line]), **changes}
    lines[line] = json.dumps({k: v for k, v in value.items() if v != "gone"})
    log.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    "changes",
    [
        {"segment": 5},
        {"segment": 0},
        {"tokens": 1},
        {"nll": "gone"},
        {"nll": "3"},
        {"nll": None},
        {"nll": -1.0},
        {"tokens_per_second": 0},
        {"tokens_per_second": None},
        {"active_bytes": "x"},
        {"resident_bytes": "gone"},
        {"perplexity": "x"},
    ],
    ids=str,
)
def test_a_damaged_line(endurance: Command, log: Path, changes: dict[str, Any]) -> None:
    change(log, 3, **changes)
    before = log.read_bytes()
    line = one_line(*endurance(5))
    assert line.startswith(f"{log}: the line of segment 2 is damaged or missing")
    assert log.read_bytes() == before


@pytest.mark.parametrize("about", ["gone", None, [1], "xx"])
def test_a_log_whose_header_says_nothing(endurance: Command, log: Path, about: Any) -> None:
    change(log, 0, about=about)
    assert "is not a whole log" in one_line(*endurance(5))


def test_what_a_header_says_cannot_reach_the_terminal(endurance: Command, log: Path) -> None:
    change(log, 0, key={"experiment": "\x1b[31mred" * 900})
    line = one_line(*endurance(5))
    assert "\x1b" not in line and len(line) < 400


def test_a_fresh_reading_that_is_none_is_read_again(endurance: Command, log: Path) -> None:
    span = {"from": 3 * SEGMENT, "to": 4 * SEGMENT}
    for figure in (0, None, "x"):
        with log.open("a") as file:
            bad = {"fresh": {**span, "perplexity": figure, "stream_perplexity": 3.0}}
            file.write(json.dumps(bad) + "\n")
        assert "read by a fresh stream" in done(*endurance(4, "--fresh")).out


# --- states ---


@pytest.mark.parametrize(
    "changes",
    [
        {"seconds": 10**400},
        {"seconds": "nan"},
        {"seconds": -1e9},
        {"seconds": float("nan")},
        {"seconds": float("inf")},
        {"nll": ""},
        {"nll": {}},
        {"nll": None},
        {"nll": [1e308] * SEGMENT},
        {"nll": [1.0] * SEGMENT, "seconds": 0.0},
        {"nll": [1.0] * (5 * SEGMENT), "seconds": 1.0},
        {"key": {}},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_a_state_that_says_the_impossible_is_not_used(
    endurance: Command, tmp_path: Path, tiny: Path, log: Path, changes: dict[str, Any]
) -> None:
    shutil.copy(log, tmp_path / "kept")
    state = tmp_path / "log.state"
    saved = snapshot.load_snapshot(state)
    model = mlx_stream.load(tiny)
    stream = TokenStream(model, model.new_cache(window=30))
    stream.restore(saved.state)
    snapshot.save_snapshot(state, stream, saved.model, {**saved.about, **changes})
    result = done(*endurance(6))
    assert "logged tokens again" in result.err
    ours = [json.loads(line)["nll"] for line in log.read_text().splitlines()[1:]]
    (tmp_path / "log").unlink()
    state.unlink()
    done(*endurance(6))
    assert ours == [json.loads(line)["nll"] for line in log.read_text().splitlines()[1:]]


def test_a_state_of_keys_that_are_no_numbers_is_not_used(
    endurance: Command, tmp_path: Path, tiny: Path, log: Path
) -> None:
    state = tmp_path / "log.state"
    saved = snapshot.load_snapshot(state)
    model = mlx_stream.load(tiny)
    stream = TokenStream(model, model.new_cache(window=30))
    keys: Any = saved.state["keys.0"]
    stream.restore({**saved.state, "keys.0": mx.full(keys.shape, float("nan"), keys.dtype)})
    snapshot.save_snapshot(state, stream, saved.model, saved.about)
    assert "logged tokens again" in done(*endurance(5)).err
    assert "again" not in done(*endurance(6)).err


# --- places ---


def test_what_is_no_state_is_not_written_over(endurance: Command, tmp_path: Path) -> None:
    mine = tmp_path / "log.state"
    mine.write_text("a novel")
    assert "a file that is none is there" in one_line(*endurance(2))
    assert mine.read_text() == "a novel"


def test_one_file_cannot_be_two_things(
    endurance: Command, tmp_path: Path, tiny: Path, text: Path
) -> None:
    mine = tmp_path / "text.svg"
    shutil.copy(text, mine)
    before = mine.read_bytes()
    perplexity = ("eval", "perplexity", tiny, mine, "--window", 30, "--segment", 50)
    log = ("--log", tmp_path / "log.svg")
    streameval = ("eval", "streameval", tiny, "--lines", 20, "--distances", 1, "--window", 150)
    for command in (
        (*perplexity, "--plot", mine),
        (*perplexity[:3], tmp_path / "a-dark.svg", "--plot", tmp_path / "a.svg"),
        ("eval", "endurance", tiny, mine, "--log", mine),
        ("eval", "endurance", tiny, mine, *log, "--plot", tmp_path / "log.svg"),
        (*streameval, "--data-out", tmp_path / "b.svg", "--plot", tmp_path / "b.svg"),
        ("eval", "plot", mine, mine),
    ):
        assert "cannot be written to" in one_line(*command)
    assert mine.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.svg"]


def test_a_pipe_is_no_log(tiny: Path, text: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    line = one_line("eval", "endurance", tiny, text, "--log", tmp_path / "pipe", *SETTINGS)
    assert line == f"{tmp_path / 'pipe'}: is no regular file: choose another"


def test_names_that_are_too_long(tiny: Path, text: Path, tmp_path: Path) -> None:
    endurance = ("eval", "endurance", tiny, text, *SETTINGS, "--tokens", SEGMENT)
    assert "choose another log" in one_line(*endurance, "--log", tmp_path / ("n" * 252))
    perplexity = ("eval", "perplexity", tiny, text, "--window", 30, "--segment", 50)
    one_line(*perplexity, "--plot", tmp_path / f"{'n' * 300}.svg")
    assert "no such file" in one_line(*perplexity, "--gguf", tmp_path / f"{'n' * 300}.gguf")
