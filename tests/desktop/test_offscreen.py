"""The desktop app as a real window, drawn by Qt off screen."""

import json
import os
import subprocess
import sys

import pytest

from tests.fakes.shell import DEADLINE


def qt_is_missing() -> str:
    """Return why Qt cannot draw here, or "" if it can."""
    if sys.platform != "linux":
        return "Toga draws with Qt on Linux only"
    # In its own process, because a backend is chosen once, and these tests have chosen the dummy.
    tried = subprocess.run(
        [sys.executable, "-c", "import toga_qt, PySide6.QtWidgets"], capture_output=True, text=True
    )
    return tried.stderr.strip().rpartition("\n")[2]


def test_a_real_window_shows_a_conversation_the_gauge_and_no_markup(letters, tmp_path):
    if reason := qt_is_missing():
        pytest.skip(reason)
    from PIL import Image

    env = {**os.environ, "QT_QPA_PLATFORM": "offscreen", "TOGA_BACKEND": "toga_qt"}
    questions = ["What is <b>this</b>?", "Go on."]
    run = subprocess.run(
        [sys.executable, "-m", "tests.measure.screenshot", letters, tmp_path, *questions],
        env=env,
        capture_output=True,
        text=True,
        timeout=2 * DEADLINE,
    )
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout.splitlines()[-1])
    assert seen["shown"].startswith("What is <b>this</b>?")
    assert "Go on." in seen["shown"] and "tokens attended" in seen["gauge"]
    assert seen["listed"] == ["\N{BULLET} What is <b>this</b>?"]
    colours = []
    for name in ("large.png", "small.png"):
        with Image.open(tmp_path / name) as image:
            drawn = image.convert("RGB").getcolors(1 << 20) or []
            colours.append({colour for count, colour in drawn if count > 100})
    for ground in ("#dcebff", "#efeff2", "#2f7de1"):  # a question, a reply, the gauge
        rgb = tuple(int(ground[at : at + 2], 16) for at in (1, 3, 5))
        assert all(rgb in found for found in colours), ground


def refused(monkeypatch, **env):
    """Return the one line that the app ends with, given these variables for its display."""
    if sys.platform != "linux":
        pytest.skip("a display is a variable on Linux only")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "QT_QPA_PLATFORM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, str(value))
    command = [sys.executable, "-m", "mlx_stream_desktop"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert ended.returncode == 1 and ended.stdout == "" and ended.stderr.count("\n") == 1
    return ended.stderr


def test_without_a_display_it_ends_with_one_line(monkeypatch):
    assert "there is no display" in refused(monkeypatch)


def test_without_a_library_of_the_system_it_ends_with_one_line(monkeypatch, tmp_path):
    (tmp_path / "toga_broken").mkdir()
    (tmp_path / "toga_broken/factory.py").write_text("raise ImportError('libEGL.so.1: no file')")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {"QT_QPA_PLATFORM": "offscreen", "TOGA_BACKEND": "toga_broken", "PYTHONPATH": path}
    assert "libEGL.so.1: no file" in refused(monkeypatch, **env)
