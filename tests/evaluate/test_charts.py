"""Charts show the rows' figures, keep their axes honest, and refuse a report without figures."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from mlx_stream.errors import ValueRefused
from mlx_stream.evaluate import charts
from mlx_stream.evaluate.report import Report
from tests.fakes.chart_samples import ABOUT, FRESH, LONG, NEEDED, REPORTS, STREAMEVAL

EVERY = pytest.mark.parametrize("name", REPORTS)


def lines_of(axes: Axes) -> dict[str, Line2D]:
    return {str(line.get_label()): line for line in axes.lines}


def ys(line: Line2D) -> list[float]:
    return np.asarray(line.get_ydata(), float).tolist()


@EVERY
def test_light_and_dark_files_are_whole_and_the_same_each_time(name: str, tmp_path: Path) -> None:
    svg, png = tmp_path / "chart.svg", tmp_path / "chart.png"
    written = [*charts.draw_chart(REPORTS[name], svg), *charts.draw_chart(REPORTS[name], png)]
    names = ["chart.svg", "chart-dark.svg", "chart.png", "chart-dark.png"]
    assert [path.name for path in written] == names
    data = [path.read_bytes() for path in written]
    assert data[0] != data[1] and data[2] != data[3]
    assert all(ElementTree.fromstring(one).tag.endswith("}svg") for one in data[:2])
    assert all(one.startswith(b"\x89PNG") and one.endswith(b"IEND\xaeB`\x82") for one in data[2:])
    with matplotlib.rc_context({"font.size": 20, "axes.linewidth": 5}):  # a user's settings
        charts.draw_chart(REPORTS[name], svg)
    assert svg.read_bytes() == data[0]


def test_matplotlib_is_imported_late_and_without_pyplot(tmp_path: Path) -> None:
    code = """if True:
        import sys
        from mlx_stream.evaluate import charts
        assert "matplotlib" not in sys.modules
        rows = [{"sinks": 4, "window": 9, "perplexity": 9.5}]
        charts.draw_chart(charts.Report("sinks", {}, rows), charts.Path(sys.argv[1]))
        assert "matplotlib.pyplot" not in sys.modules"""
    subprocess.run([sys.executable, "-c", code, tmp_path / "chart.svg"], check=True)


def test_a_chart_that_cannot_be_written_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for place in ("chart.pdf", "chart", "nowhere/c.svg"):
        with pytest.raises(ValueRefused, match=Path(place).stem):
            charts.check_plot(tmp_path / place)
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(ValueRefused, match=r"folder\.svg: could not be written"):
        charts.draw_chart(REPORTS["sinks"], tmp_path / "folder.svg")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueRefused, match=r"pip install 'mlx_stream\[eval\]'"):
        charts.check_plot(tmp_path / "chart.PNG")


@EVERY
def test_a_report_without_a_figure_is_refused(name: str) -> None:
    report = REPORTS[name]
    for key in NEEDED[name].split():
        first, *rows = report.rows
        rows.insert(0, {k: v for k, v in first.items() if k != key})
        if key != "cache":  # a row without a cache counts as the stream's
            with pytest.raises(ValueRefused, match=r"^cannot draw"):
                charts.make_figure(Report(name, report.about, rows))


def test_an_unknown_experiment_no_rows_and_bad_facts_are_refused() -> None:
    for report in (
        Report("nothing", {}, [{"tokens": 1}]),
        Report("sinks", {}, []),
        Report("streameval", ABOUT, STREAMEVAL),  # without the number of candidates
        Report("endurance", ABOUT | {"fresh": {"from": 1}}, LONG),
    ):
        with pytest.raises(ValueRefused, match=r"^cannot draw"):
            charts.make_figure(report)


def test_every_segment_is_drawn_as_it_was_measured() -> None:
    report = REPORTS["perplexity"]
    panels = charts.make_figure(report).axes
    losses = lines_of(panels[0])
    caches = [*dict.fromkeys(row["cache"] for row in report.rows)]
    for place, cache in enumerate(caches):
        rows = [row for row in report.rows if row["cache"] == cache]
        assert ys(losses[cache]) == [row["perplexity"] for row in rows]
        assert np.asarray(losses[cache].get_xdata()).tolist() == [row["tokens"] for row in rows]
        speed, memory = (axes.lines[place] for axes in panels[1:])
        assert ys(speed) == [row["tokens_per_second"] for row in rows]
        if cache != "llama.cpp":  # its memory is unknown
            assert ys(memory) == [row["active_bytes"] / 1e6 for row in rows]
        assert speed.get_color() == memory.get_color() == losses[cache].get_color()
    assert {"window 1,020", "trained context 8,192"} <= set(losses)
    assert panels[0].get_yscale() == "log"
    assert panels[1].get_ylim()[0] == panels[2].get_ylim()[0] == 0


@pytest.mark.parametrize("value", [None, math.inf])
def test_an_infinite_perplexity_is_not_drawn(value: float | None, tmp_path: Path) -> None:
    rows = [*REPORTS["perplexity"].rows]
    rows[-1] = rows[-1] | {"perplexity": value}
    report = Report("perplexity", ABOUT, rows)
    assert not math.isfinite(ys(lines_of(charts.make_figure(report).axes[0])["llama.cpp"])[-1])
    charts.draw_chart(report, tmp_path / "chart.svg")


def test_a_fresh_stream_is_a_line_over_its_range() -> None:
    axes = charts.make_figure(REPORTS["endurance"]).axes[0]
    line = lines_of(axes)[f"fresh stream {FRESH['perplexity']}"]
    x: Any = line.get_xdata()
    assert ([*x], [*ys(line)]) == ([100_000, 200_000], [21.25, 21.25])
    low, high = axes.get_ylim()
    assert high / low >= 4, "noise is not blown up"


def test_latency_has_whiskers_to_p99() -> None:
    axes = charts.make_figure(REPORTS["latency"]).axes[0]
    assert ys(axes.lines[0]) == [28, 32, 44]
    whiskers = [path.vertices[:, 1].tolist() for path in axes.collections[0].get_paths()]  # type: ignore[index]
    assert whiskers[0] == pytest.approx([28, 36.4])


def test_streameval_shades_distances_outside_the_window() -> None:
    axes = charts.make_figure(REPORTS["streameval"]).axes[0]
    assert ys(lines_of(axes)["likelihood"]) == [100, 95, 90, 12, 9]
    assert [patch.get_x() for patch in axes.patches] == [2.5]  # type: ignore[attr-defined]
    inside = charts.make_figure(Report("streameval", {"candidates": 4}, STREAMEVAL[:2]))
    assert not inside.axes[0].patches


@EVERY
def test_one_row_is_enough(name: str, tmp_path: Path) -> None:
    report = Report(name, REPORTS[name].about, REPORTS[name].rows[:1])
    charts.draw_chart(report, tmp_path / "chart.svg")
