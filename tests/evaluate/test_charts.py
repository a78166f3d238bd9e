"""Charts are drawn, say what the rows say, keep their axes honest, and refuse what is none."""

import itertools
import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from mlx_stream.errors import ValueRefused
from mlx_stream.evaluate import charts
from mlx_stream.evaluate.report import Report
from tests.fakes.chart_samples import (
    ABOUT,
    FLAT,
    FRESH,
    LONG,
    NEEDED,
    NULLABLE,
    REPORTS,
    STREAMEVAL,
    WINDOWS,
    segments,
    sweep,
)

EVERY = pytest.mark.parametrize("name", REPORTS)


def changed(name: str, key: str, value: Any, row: int = 0) -> Report:
    """Return a report with one figure of one row replaced."""
    rows = [dict(one) for one in REPORTS[name].rows]
    rows[row][key] = value
    return Report(name, REPORTS[name].about, rows)


def named(axes: Axes) -> dict[str, Line2D]:
    """Return the lines that show, by name."""
    lines = [line for line in axes.lines if len(ys(line)) and line.get_label()[:1] != "_"]  # type: ignore[index]
    return {str(line.get_label()): line for line in lines}


def xs(line: Line2D) -> list[float]:
    return np.asarray(line.get_xdata(), float).tolist()


def ys(line: Line2D) -> list[float]:
    return np.asarray(line.get_ydata(), float).tolist()


def drawn_texts(figure: Figure) -> list[Text]:
    """Return all text that shows."""
    found = list(figure.texts)
    for axes in figure.axes:
        found += [one for one in axes.get_children() if isinstance(one, Text)]
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            seen = [t for t in axis.get_major_ticks() if limits[0] <= t.get_loc() <= limits[1]]
            found += [axis.label, *(tick.label1 for tick in seen)]
    return [text for text in found if text.get_visible() and text.get_text().strip()]


def says(figure: Figure) -> list[str]:
    return [text.get_text() for text in drawn_texts(figure)]


def printed(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


@EVERY
def test_light_and_dark_files_are_whole_and_the_same_each_time(name: str, tmp_path: Path) -> None:
    svg, png = tmp_path / "chart.svg", tmp_path / "chart.png"
    written = [*charts.draw_chart(REPORTS[name], svg), *charts.draw_chart(REPORTS[name], png)]
    names = ["chart.svg", "chart-dark.svg", "chart.png", "chart-dark.png"]
    assert [path.name for path in written] == names
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    data = [path.read_bytes() for path in written]
    assert data[0] != data[1] and data[2] != data[3]
    for one in data[:2]:
        root = ElementTree.fromstring(one)
        assert root.tag.endswith("}svg") and not list(root.iter("{http://www.w3.org/2000/svg}text"))
        assert len(one) < 150_000
    for one in data[2:]:
        assert one.startswith(b"\x89PNG\r\n\x1a\n") and one.endswith(b"IEND\xaeB`\x82")
        assert struct.unpack(">I", one[16:20]) == (1_660,)  # twice 830 pixels
    for path in (svg, png) if name == "sinks" else (svg,):
        with matplotlib.rc_context({"font.size": 20, "svg.hashsalt": None, "axes.linewidth": 5}):
            charts.draw_chart(REPORTS[name], path)
    assert [path.read_bytes() for path in written] == data


def test_four_million_tokens_stay_a_small_file(tmp_path: Path) -> None:
    noise = (22 + 4 * np.sin(np.arange(1_950) ** 2)).tolist()
    rows = segments("", noise, 110, 586e6)
    for row, speed in zip(rows, reversed(noise), strict=True):
        row["tokens_per_second"] = speed
    report = Report("endurance", ABOUT, rows)
    assert len(charts.draw_chart(report, tmp_path / "chart.svg")[0].read_bytes()) < 150_000


def test_matplotlib_is_imported_late_without_pyplot_and_left_as_it_was(tmp_path: Path) -> None:
    code = """if True:
        import sys
        from mlx_stream.evaluate import charts
        assert "matplotlib" not in sys.modules
        rows = [{"sinks": 4, "window": 9, "perplexity": 9.5}]
        charts.draw_chart(charts.Report("sinks", {}, rows), charts.Path(sys.argv[1]))
        assert "matplotlib.pyplot" not in sys.modules"""
    subprocess.run([sys.executable, "-c", code, tmp_path / "chart.svg"], check=True)
    before = list(dict.items(matplotlib.rcParams))
    charts.make_figure(REPORTS["sinks"])
    assert list(dict.items(matplotlib.rcParams)) == before


@pytest.mark.parametrize("place", ["chart.pdf", "chart", "nowhere/c.svg", "folder.svg", "x.png"])
def test_a_file_that_cannot_be_written_is_refused_beforehand(place: str, tmp_path: Path) -> None:
    for folder in ("folder.svg", "x-dark.png"):
        (tmp_path / folder).mkdir()
    before = sorted(tmp_path.rglob("*"))
    for refusing in (charts.check_plot, lambda path: charts.draw_chart(REPORTS["sinks"], path)):
        with pytest.raises(ValueRefused) as caught:
            refusing(tmp_path / place)
        assert "\n" not in str(caught.value) and place in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_check_changes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "chart.PNG"
    path.write_text("mine")
    charts.check_plot(path)
    assert [one.read_text() for one in tmp_path.iterdir()] == ["mine"]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueRefused, match=r"^--plot needs matplotlib: pip install 'mlx_stream\[e"):
        charts.check_plot(path)


@pytest.mark.parametrize("method", ["write_bytes", "replace"])
def test_no_half_file(method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "chart.svg"
    path.write_text("before")
    real = getattr(Path, method)

    def failing(self: Path, other: Any) -> Any:
        if other == b"":  # before anything is measured, all is well
            return real(self, other)
        if method == "write_bytes":
            real(self, other[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, method, failing)
    with pytest.raises(ValueRefused) as caught:
        charts.draw_chart(REPORTS["sinks"], path)
    assert str(caught.value) == f"{path}: could not be written: No space left on device"
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("chart.svg", "before")]


@pytest.mark.parametrize(("name", "key"), [(n, key) for n in NEEDED for key in NEEDED[n].split()])
def test_a_row_without_what_is_needed_is_refused(name: str, key: str, tmp_path: Path) -> None:
    bad = [[], {}, -1, -math.inf, *([] if key in NULLABLE else [None, math.nan])]
    if key not in ("cache", "method"):
        bad.append("\x1b[31m\n" * 20)
    for value in bad:
        with pytest.raises(ValueRefused) as caught:
            charts.draw_chart(changed(name, key, value, row=-1), tmp_path / "chart.svg")
        message = str(caught.value)
        assert message.startswith("no chart: ") and repr(key) in message and message.isprintable()
        assert len(message) < 120 and not list(tmp_path.iterdir())


def test_an_unknown_experiment_no_rows_and_bad_facts_are_refused() -> None:
    for report in (
        Report("nothing\n", {}, [{"tokens": 1}]),
        Report("sinks", {}, []),
        Report("streameval", ABOUT, STREAMEVAL),  # which says nothing of candidates
        Report("endurance", ABOUT | {"fresh": FRESH | {"from": "x"}}, LONG),
    ):
        with pytest.raises(ValueRefused, match=r"^no chart: .*$"):
            charts.make_figure(report)


def test_hostile_text_is_shown_as_text(tmp_path: Path) -> None:
    report = REPORTS["perplexity"]
    odd = "$x^{$ \x00\x1b[31m\n<b>&\ud800 \u4e2d _ " + 90 * "y"
    about = report.about | {"model": odd, "texts": [odd] * 9, "machine": {"device": odd}}
    rows = [row | {"cache": odd} for row in report.rows[:3]]
    light, _ = charts.draw_chart(
        Report("perplexity", about | {"window": odd}, rows), tmp_path / "a.svg"
    )
    ElementTree.fromstring(light.read_bytes())
    texts = says(charts.make_figure(Report("perplexity", about, rows)))
    assert any("$x^{$ [31m <b>&" in text for text in texts) and max(map(len, texts)) < 200


@pytest.mark.parametrize("name", ["perplexity", "endurance"])
def test_speed_and_memory_begin_at_0_and_perplexity_is_logarithmic(name: str) -> None:
    losses, speeds, memory = charts.make_figure(REPORTS[name]).axes
    assert (losses.get_yscale(), losses.get_ylabel()) == ("log", "perplexity (log)")
    assert speeds.get_ylabel() == "tokens/s" and memory.get_ylabel() == "memory (MB)"
    for axes in (speeds, memory):
        assert axes.get_ylim()[0] == 0 and axes.get_yscale() == "linear"
        assert all(max(ys(line)) < axes.get_ylim()[1] for line in named(axes).values())
    assert losses.get_ylim()[1] / losses.get_ylim()[0] >= 4  # noise is not blown up
    last = max(row["tokens"] for row in REPORTS[name].rows)
    assert memory.get_xlim() == (0, last) and memory.get_xscale() == "linear"


def test_every_segment_is_drawn_as_it_was_measured() -> None:
    report = REPORTS["perplexity"]
    losses, speeds, memory = (named(axes) for axes in charts.make_figure(report).axes)
    assert set(losses) == set(speeds) == {row["cache"] for row in report.rows}
    assert set(memory) == set(losses) - {"llama.cpp"}
    for cache, line in losses.items():
        rows = [row for row in report.rows if row["cache"] == cache]
        assert ys(line) == [row["perplexity"] for row in rows]
        assert ys(speeds[cache]) == [row["tokens_per_second"] for row in rows]
        assert xs(line) == [row["tokens"] for row in rows]
        if cache in memory:
            assert ys(memory[cache]) == [row["active_bytes"] / 1e6 for row in rows]


def test_infinite_perplexity_is_a_triangle_at_the_top() -> None:
    for value in (None, math.inf, 1e300):
        axes = charts.make_figure(changed("perplexity", "perplexity", value, row=7)).axes[0]
        assert math.isnan(ys(named(axes)["dense"])[-1]) and len(ys(named(axes)["dense"])) == 8
        triangles = [(xs(line), ys(line)) for line in axes.lines if line.get_marker() == "^"]
        assert ([8 * 2_048], [axes.get_ylim()[1]]) in triangles
        assert "dense: infinite" in printed(axes)


@pytest.mark.parametrize("rising", [1.0, 2.9, 3.1, math.inf])
def test_perplexity_over_sinks_is_from_0_or_logarithmic_and_printed(rising: float) -> None:
    figure = charts.make_figure(
        Report("sinks", {}, sweep([20.5 * rising, 22.5, 21.5, 21.25, 20.5]))
    )
    (axes,) = figure.axes
    scale, low = ("log", axes.get_ylim()[0]) if rising > 3 else ("linear", 0)
    assert (axes.get_yscale(), axes.get_ylim()[0]) == (scale, low)
    assert axes.get_ylabel() == "perplexity" + " (log)" * (rising > 3)
    first = {1.0: "20.5", 2.9: "59.4", 3.1: "63.6", math.inf: "infinite"}[rising]
    assert printed(axes) == [first, "22.5", "21.5", "21.2", "20.5"]
    assert {"0 + 252", "8 + 4,092"} <= set(says(figure))


def test_windows_are_spaced_by_doubling_and_their_cache_begins_at_0() -> None:
    losses, memory = charts.make_figure(REPORTS["windows"]).axes
    assert memory.get_ylim()[0] == 0 and losses.get_yscale() == "log"
    assert memory.get_xticks() == pytest.approx(np.log2(WINDOWS))
    assert [tick.get_text() for tick in memory.get_xticklabels()] == [f"{w:,}" for w in WINDOWS]
    assert memory.get_xlabel().endswith("(log)") and printed(memory)[-1] == "189"
    assert ys(named(memory)["stream"])[0] == pytest.approx(46_080 * 252 / 1e6)


def test_the_setting_the_machine_the_window_and_the_trained_context_are_named() -> None:
    figure = charts.make_figure(REPORTS["perplexity"])
    assert {
        "Reading 49,152 tokens: perplexity, speed and memory",
        "tiny · float32 · a.txt, emma.txt · 4 sinks · window 1,020",
        "AMD EPYC · 2 cores · mlx_stream 0.1.0 · mlx 0.32.4",
        "tokens read, in segments of 2,048",
        *("window 1,020", "trained context 8,192", "mlx-lm, chunk 1: 22.7", "stream: 20.2"),
    } <= set(says(figure))
    for axes in figure.axes:
        upright = [xs(line)[0] for line in axes.lines if ys(line) == [0, 1]]
        assert upright == [1_020, 8_192]
    long = Report("endurance", ABOUT, segments("", FLAT * 40, 110, 586e6))
    marked = printed(charts.make_figure(long).axes[0])
    assert "trained context 8,192" in marked and "window 1,020" not in marked  # as wide as a dash
    metal = {"machine": {"device": "Apple M3", "metal": True}}
    assert "Apple M3 · Metal" in says(charts.make_figure(Report("sinks", metal, sweep([9.5] * 5))))


def test_a_fresh_stream_is_a_line_over_its_range() -> None:
    figure = charts.make_figure(REPORTS["endurance"])
    start = "100,000 to 200,000: stream 21.4, fresh stream "
    assert f"{start}21.2" in says(figure)
    (line,) = (line for line in figure.axes[0].lines if line.get_marker() == "|")
    assert (xs(line), ys(line)) == ([100_000, 200_000], [21.25, 21.25])
    infinite = REPORTS["endurance"].about | {"fresh": FRESH | {"perplexity": None}}
    assert f"{start}infinite" in says(charts.make_figure(Report("endurance", infinite, LONG)))


def test_latency_shows_the_sizes_there_are_whiskers_to_p99_and_the_speed_up() -> None:
    axes = charts.make_figure(REPORTS["latency"]).axes[0]
    lines = named(axes)
    assert set(lines) == {"stream", "recompute", "mlx-lm", "stream, re-anchoring"}
    assert ys(lines["stream"]) == [28, 32, 44] and ys(lines["stream, re-anchoring"]) == [60.5]
    near = np.array(xs(lines["stream"])) - np.log2([256, 1_024, 4_096])
    assert np.abs(near).max() < 0.2
    whiskers = [path.vertices[:, 1].tolist() for path in axes.collections[0].get_paths()]  # type: ignore[index]
    assert [28, pytest.approx(36.4)] in whiskers and [60.5, 62] in whiskers
    assert {"10.7x faster", "34.4x faster", "116x faster"} <= set(printed(axes))
    assert axes.get_yscale() == "log" and axes.get_ylabel().endswith("(log)")


def test_streameval_shades_what_left_the_window_and_marks_chance() -> None:
    rows = [dict(row) for row in reversed(STREAMEVAL)]
    rows[1] |= {"generation": None, "queries": 20}
    figure = charts.make_figure(Report("streameval", REPORTS["streameval"].about, rows))
    (axes,) = figure.axes
    assert ys(named(axes)["likelihood"]) == [100, 95, 90, 12, 9]
    assert ys(named(axes)["generation"]) == [98, 88, 71, 0]
    assert [patch.get_x() for patch in axes.patches] == [2.5]  # type: ignore[attr-defined]
    assert axes.get_ylim() == (0, 104) and [10, 10] in [ys(line) for line in axes.lines]
    assert {"left the window", "chance: 10", "160\n3,744"} <= set(says(figure))
    assert any("20 to 50 queries each" in text for text in says(figure))
    inside = charts.make_figure(Report("streameval", {"candidates": 4}, STREAMEVAL[:2]))
    assert not inside.axes[0].patches and "left the window" not in says(inside)


@EVERY
def test_one_row_is_enough(name: str) -> None:
    figure = charts.make_figure(Report(name, REPORTS[name].about, REPORTS[name].rows[-1:]))
    assert all(len(xs(line)) == 1 for axes in figure.axes for line in named(axes).values())


@EVERY
def test_no_text_covers_another_or_is_cut_off(name: str) -> None:
    figure = charts.make_figure(REPORTS[name])
    figure.canvas.draw()
    boxes = [(text.get_text(), Text.get_window_extent(text)) for text in drawn_texts(figure)]
    for text, box in boxes:
        assert 0 <= box.x0 <= box.x1 <= figure.bbox.x1, text
        assert 0 <= box.y0 <= box.y1 <= figure.bbox.y1, text
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        inner = [min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)]
        assert min(inner) < 1.5, f"{one!r} covers {other!r}"
    assert all(float(text.get_fontsize()) >= 9 for text in drawn_texts(figure))


def test_names_of_marks_that_stand_close_do_not_meet() -> None:
    about = ABOUT | {"trained_context": 1_500}
    figure = charts.make_figure(Report("perplexity", about, REPORTS["perplexity"].rows))
    names = [
        t for t in drawn_texts(figure) if t.get_text() in ("window 1,020", "trained context 1,500")
    ]
    window, trained = (Text.get_window_extent(text) for text in names)
    assert window.x1 < trained.x0


@pytest.mark.parametrize("dark", [False, True])
def test_every_colour_is_seen(dark: bool) -> None:
    def light(colour: str) -> float:
        """Return the relative luminance of WCAG 2."""
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    with charts.theme(dark) as ink:
        for name in {"text", "muted"} | {colour for colour, *_ in charts.STYLES.values()}:
            for paper in ("paper", "shade"):
                low, high = sorted([light(ink[paper]), light(ink[name])])
                assert (high + 0.05) / (low + 0.05) >= 4.5, name
    assert len(set(charts.STYLES.values())) == len(charts.STYLES)
