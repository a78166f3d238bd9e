"""Installed programs as commands: found by entry points, given all remaining arguments."""

import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest

from mlx_stream import cli
from mlx_stream.cli import ENTRY_POINTS, PROGRAMS, installed_programs
from tests.fakes.refusals import one_line
from tests.fakes.shell import done, program, run

ROOT = Path(__file__).parents[2]


def test_the_project_declares_the_programs_that_help_knows():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    declared = project["entry-points"][ENTRY_POINTS]
    assert set(declared) == set(PROGRAMS)
    assert {entry.name: entry.value for entry in entry_points(group=ENTRY_POINTS)} == declared


def test_help_lists_them_behind_the_verbs():
    lines = done("--help").out.splitlines()
    for name, sentence in PROGRAMS.items():
        assert any(line.split() == [name, *sentence.split()] for line in lines)


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_of_one_is_its_own(name):
    found = subprocess.run(
        program(name, "--help"), capture_output=True, text=True, check=True
    ).stdout
    assert found.lower().startswith(f"usage: mlx_stream {name} ")
    assert "--window" in found if name == "desktop" else "uninstall" in found


def test_one_ends_with_its_own_status_and_says_what_it_says():
    found = run("assistant", "status", "--name", "nobody")
    assert found.code == 1 and "the assistant 'nobody' is not running" in found.err
    assert run("assistant", "--nothing").code == 2
    assert run("desktop", "--nothing").code == 2


def fake_program(monkeypatch, value: str, name: str = "other") -> None:
    entry = EntryPoint(name, value, ENTRY_POINTS)
    monkeypatch.setattr(cli, "installed_programs", lambda: {name: entry})


def test_all_that_follows_is_handed_on_as_it_is(monkeypatch):
    called = []

    def main(arguments, name):
        called.append((arguments, name))

    monkeypatch.setattr(sys.modules[__name__], "main", main, raising=False)
    fake_program(monkeypatch, f"{__name__}:main")
    words = ["run", "--help", "-x", "--version", "--", "a b", "--model=x"]
    done("other", *words)
    assert called == [(words, "mlx_stream other")]
    assert "other" in done("--help").out


def test_one_whose_package_is_missing_is_a_line(monkeypatch):
    """A hint names an extra only if there is one."""
    fake_program(monkeypatch, "mlx_stream_nowhere.app:main")
    assert one_line("other") == "other needs mlx_stream_nowhere, which is not installed"
    fake_program(monkeypatch, "mlx_stream_nowhere.app:main", "desktop")
    assert one_line("desktop") == (
        "desktop needs mlx_stream_nowhere, which is not installed: "
        "pip install 'mlx_stream[desktop]'"
    )


def test_none_takes_the_place_of_a_verb(monkeypatch):
    entries = [EntryPoint(name, "os:abort", ENTRY_POINTS) for name in ("chat", "another")]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: entries)
    assert [*installed_programs()] == ["another"]
    assert "chat" in done("chat", "--help").out
