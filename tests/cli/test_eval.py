"""The experiments as commands: tables, JSON, CSV, charts, and refusals."""

import csv
import importlib
import io
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_stream.errors import TextError
from mlx_stream.evaluate import llamacpp
from tests.fakes.refusals import one_line
from tests.fakes.shell import done, parsed, run

SMALL = ("--segment", 50, "--tokens", 150, "--window", 30)
Eval = Callable[..., tuple[object, ...]]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The man and the other one sat in the shade of a tree.\n" * 12)
    return path


@pytest.fixture
def experiments(tiny: Path, text: Path) -> dict[str, tuple[object, ...]]:
    """Return a small command for each experiment."""
    return {
        "perplexity": ("eval", "perplexity", tiny, text, *SMALL, "--cache", "stream"),
        "sinks": ("eval", "sinks", tiny, text, "--capacity", 32, "--tokens", 100),
        "windows": ("eval", "windows", tiny, text, "--window", 20, "--window", 40, "--tokens", 99),
        "latency": ("eval", "latency", tiny, "--cache", 32, "--cache", "64,steps=20"),
        "streameval": (
            *("eval", "streameval", tiny, "--lines", 40, "--window", 150),
            *("--distances", 1, "--distances", 10),
        ),
        "endurance": (
            *("eval", "endurance", tiny, text, "--log", text.with_name("log")),
            *("--segment", 50, "--tokens", 500, "--window", 30),
        ),
    }


NAMES = ["perplexity", "sinks", "windows", "latency", "streameval", "endurance"]


@pytest.mark.parametrize("name", NAMES)
def test_json_csv_table_and_charts_show_the_same(
    name: str, experiments: dict[str, tuple[object, ...]], tmp_path: Path
) -> None:
    command, saved = experiments[name], tmp_path / "saved.json"
    saved.write_text(done(*command, "--json", "--plot", tmp_path / "one.svg").out)
    report = parsed(saved.read_text())
    assert (report["experiment"], report["about"]["model"]) == (name, "tiny")
    assert report["about"]["machine"]["mlx"] and report["rows"]
    rows = list(csv.DictReader(io.StringIO(done(*command, "--csv").out)))
    assert [list(row) for row in rows] == [list(row) for row in report["rows"]]
    table = done(*command).out.splitlines()
    assert len(table) == 1 + len(report["rows"]) + len(report["notes"])
    assert re.search("perplexity|p50 ms|by likelihood", table[0])
    drawn = done("eval", "plot", saved, tmp_path / "two.svg").err
    for part in ("", "-dark"):
        one, two = (tmp_path / f"{name}{part}.svg" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes() and f"drew {two}" in drawn


@pytest.mark.parametrize("content", ["", "[]", '{"experiment": 1}', "\xff"])
def test_another_file_is_not_drawn(tmp_path: Path, content: str) -> None:
    kept = tmp_path / "kept.json"
    kept.write_text(content, "latin-1")
    line = one_line("eval", "plot", kept, tmp_path / "chart.png")
    assert line == f"{kept}: not the output of `mlx_stream eval --json`"
    assert list(tmp_path.iterdir()) == [kept]
    assert "cannot be read" in one_line("eval", "plot", tmp_path / "no", tmp_path / "chart.png")


def test_the_data_of_streameval_can_be_saved(
    experiments: dict[str, tuple[object, ...]], tmp_path: Path
) -> None:
    done(*experiments["streameval"], "--data-out", tmp_path / "data")
    kinds = [next(iter(parsed(f"{x}\n"))) for x in (tmp_path / "data").read_text().splitlines()]
    assert kinds[0] == "format" and kinds.count("line") == 40 and kinds.count("query") >= 6
    bad = tmp_path / "data" / "nowhere"
    assert str(bad) in one_line(*experiments["streameval"], "--data-out", bad)


@pytest.mark.parametrize("name", NAMES)
def test_output_is_refused_before_anything_is_measured(
    name: str, experiments: dict[str, tuple[object, ...]], tmp_path: Path
) -> None:
    assert one_line(*experiments[name], "--json", "--csv").startswith("--json and --csv")
    for place in ("chart.gif", "nowhere/chart.svg", "."):
        one_line(*experiments[name], "--plot", tmp_path / place)
    assert not (tmp_path / "log").exists()


# --- perplexity ---


def test_perplexity_beside_mlx_lm(tiny: Path, text: Path) -> None:
    command = ("eval", "perplexity", tiny, text, *SMALL)
    caches = ("stream", "window", "dense", "recompute,stride=25", "mlx-lm", "mlx-lm,chunk=1")
    options = [word for cache in caches for word in ("--cache", cache)]
    report = parsed(done(*command, *options, "--json").out)
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in report["rows"]:
        rows.setdefault(row["cache"], []).append(row)
    assert list(rows) == [
        *("stream", "window", "dense", "recompute, stride 25", "mlx-lm", "mlx-lm, chunk 1")
    ]
    assert all([row["tokens"] for row in mine] == [50, 100, 150] for mine in rows.values())
    scored = parsed(done("score", tiny, text, "--window", 30, "--max-tokens", 151, "--json").out)
    mean = sum(scored["nll"]) / 150
    assert sum(row["nll"] for row in rows["stream"]) / 3 == pytest.approx(mean, abs=1e-4)


def test_the_default_caches_and_peers(tiny: Path, text: Path) -> None:
    command = ("eval", "perplexity", tiny, text, *SMALL, "--window", 140)
    report = parsed(done(*command, "--json", "--against", "mlx-lm").out)
    labels = ["dense", "window", "recompute, stride 128", "stream", "mlx-lm"]
    assert report["about"]["caches"] == labels
    report = parsed(done("eval", "perplexity", tiny, text, *SMALL, "--json").out)
    assert "recompute, stride 34" in report["about"]["caches"], "a small window, a small stride"


def test_a_peer_that_is_not_installed_is_reported(tiny: Path, text: Path) -> None:
    reason = llamacpp.why_not(None)
    assert reason
    command = ("eval", "perplexity", tiny, text, *SMALL, "--cache", "stream")
    result = done(*command, "--against", "llama.cpp")
    assert result.out.splitlines()[-1] == f"llama.cpp: not measured, because {reason}"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--cache", "streem"), "--cache must be one of "),
        (("--cache", "stream,tokens=x"), "tokens must be a whole number"),
        (("--cache", "stream,stride=2"), "expected tokens, chunk, kv, clock, each at most once"),
        (("--cache", "stream,chunk=1,chunk=2"), "each at most once, not 'chunk=2'"),
        (("--cache", "recompute,stride=²"), "stride must be a whole number, at least 1, not '²'"),
        (("--cache", "stream,chunk=-1"), "chunk must be a whole number, at least 1, not '-1'"),
        (("--cache", "recompute,stride=35"), "a stride of 35 and 0 sinks exceed the cache of 34"),
        (("--cache", "recompute,sinks=34,stride=1"), "a stride of 1 and 34 sinks exceed the cache"),
        (("--cache", "stream,tokens=49"), "--cache stream reads less than a segment of 50 tokens"),
        (("--cache", "dense", "--cache", "stream,kv=5"), "--cache stream,kv=5: kv must be 8 or 4"),
        (("--cache", "dense", "--cache", "stream,clock=9"), "clock must be at least 68"),
        (("--tokens", 49), "reads less than a segment of 50 tokens"),
        (("--tokens", 0), "--tokens must be at least 1, not 0"),
        (("--cache", "stream", "--gguf", __file__), "--gguf is for llama.cpp"),
        (("--segment", 0), "--segment must be at least 1, not 0"),
        (("--segment", 5000), "tokens, but 5,001 are needed"),
        (("--window", 0), "--window must be at least 1, not 0"),
        (("--window", 100_000), "exceed the model's trained context"),
        (("--against", "ollama"), "--against must be one of mlx-lm, llama.cpp, not 'ollama'"),
        (("--gguf", "nowhere.gguf"), "nowhere.gguf: no such file"),
        (("--dtype", "int4"), "--dtype must be one of"),
    ],
)
def test_perplexity_is_refused(
    tiny: Path, text: Path, change: tuple[object, ...], said: str
) -> None:
    assert said in one_line("eval", "perplexity", tiny, text, *SMALL, *change)


@pytest.mark.parametrize("name", ["perplexity", "sinks", "windows", "endurance"])
def test_texts_and_models_that_cannot_be_read(name: str, tiny: Path, tmp_path: Path) -> None:
    log = ("--log", tmp_path / "log") if name == "endurance" else ()
    (tmp_path / "short.txt").write_text("The man")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text("")
    for file, said in (
        ("missing.txt", "missing.txt: cannot be read: No such file or directory"),
        ("short.txt", "are needed: use a longer text"),
        ("latin.txt", "is not UTF-8"),
        ("empty.txt", "is empty"),
    ):
        command = ("eval", name, tiny, tmp_path / file, "--window", 30, *log)
        if name == "sinks":
            command = ("eval", name, tiny, tmp_path / file, "--capacity", 30)
        assert said in one_line(*command)
    assert "no such folder" in one_line("eval", name, "./nowhere", tmp_path / "short.txt", *log)
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("sinks", "--capacity", 8), "--capacity must be above 8, the number of sinks, not 8"),
        (("sinks", "--sinks", -1), "--sinks must be from 0"),
        (("sinks", "--capacity", 40, "--tokens", 0), "must be at least 1"),
        (("sinks", "--capacity", 40, "--chunk", 0), "must be at least 1"),
        (("windows", "--window", 0), "--window must be at least 1"),
    ],
)
def test_sweeps_are_refused(tiny: Path, text: Path, command: tuple[object, ...], said: str) -> None:
    name, *options = command
    assert said in one_line("eval", name, tiny, text, *options)


@pytest.mark.parametrize("size", ["x", "4", "64,steps=2", "64,steps=20,steps=21", "100000", "²"])
def test_latency_is_refused(tiny: Path, size: str) -> None:
    line = one_line("eval", "latency", tiny, "--cache", size)
    assert re.search("--cache|--steps|trained context", line)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), TextError("no more")])
@pytest.mark.parametrize(
    ("name", "of", "options", "rows"),
    [
        ("perplexity", "perplexity.measure_perplexity", (*SMALL, "--cache", "stream"), 1),
        ("sinks", "sweeps.sweep", ("--capacity", 40, "--tokens", 60), 1),
        ("windows", "sweeps.sweep", ("--window", 30, "--window", 60, "--tokens", 60), 1),
        ("latency", "latency.measure_latency", ("--cache", 32, "--cache", 48, "--steps", 20), 7),
    ],
)
def test_an_interrupted_experiment_shows_the_figures_it_has(
    tiny: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    of: str,
    options: tuple[object, ...],
    rows: int,
    error: BaseException,
) -> None:
    module, function = of.split(".")
    where = importlib.import_module(f"mlx_stream.evaluate.{module}")
    whole = getattr(where, function)

    def cut(*args: Any) -> Any:
        yield from itertools.islice(whole(*args), rows)
        raise error

    monkeypatch.setattr(where, function, cut)
    files = () if name == "latency" else (text,)
    result = run("eval", name, tiny, *files, *options)
    assert result.code == (130 if isinstance(error, KeyboardInterrupt) else 1)
    lines = result.out.splitlines()
    if name == "latency":  # the size that was not measured is left out
        sizes = [line.split()[0] for line in lines[1:] if line[:1].isdigit()]
        assert sizes == ["32"] * 5
    else:
        assert len(lines) == 3
    assert "interrupted" in lines[-1]
