"""Draw reports as charts, light and dark; knows matplotlib (an extra) and measures nothing.

Nothing is smoothed; an infinite perplexity is a triangle at the top edge. Matplotlib's constrained
layout places everything. Lines differ by marker as well as colour.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_stream.errors import ValueRefused
from mlx_stream.evaluate.report import Report, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 8.3  # inches of 100 pixels: the width of a README on GitHub
# After Okabe and Ito.
LIGHT = ["#0067b1", "#c2410c", "#00795a", "#a2387c", "#8a5a00", "#59636e", "#1f2328"]
DARK = ["#58b0ff", "#ff8a5c", "#3ccf9e", "#e391c5", "#e3b341", "#9aa4af", "#e6edf3"]
PAPER, DARK_PAPER = "#ffffff", "#0d1117"
# The place of a name is that of its colour and marker.
NAMES = ["stream", "dense", "recompute", "window", "mlx-lm", "llama.cpp", "fresh"]
NAMES += ["likelihood", "generation"]
MARKERS = "os^vDX.os"
Values = Sequence[float] | np.ndarray


def check_plot(path: Path) -> None:
    """Raise ValueRefused, before hours of measuring, if no chart could be written to a file."""
    if path.suffix.lower() not in (".png", ".svg"):
        raise ValueRefused(f"{path}: the name of a chart must end in .png or .svg")
    for one in (path, dark_twin(path)):
        there = os.path.exists(one)  # noqa: PTH110  (a name of any length)
        if not os.access(one if there else one.parent, os.W_OK) or (there and one.is_dir()):
            raise ValueRefused(f"{one}: no file can be written there")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueRefused("--plot needs matplotlib: pip install 'mlx_stream[eval]'") from error


def dark_twin(path: Path) -> Path:
    return path.with_name(f"{path.stem}-dark{path.suffix}")


def draw_chart(report: Report, path: Path) -> list[Path]:
    """Write a report's light chart to `path` and its dark one beside it; return both paths.

    Raises:
        ValueRefused: the report has no chart, or a file could not be written.
    """
    check_plot(path)
    metadata = {"Software": None} if path.suffix.lower() == ".png" else {"Date": None}
    paths = [path, dark_twin(path)]
    for one, dark in zip(paths, (False, True), strict=True):
        with theme(dark):
            figure = make_figure(report)
            try:
                figure.savefig(one, dpi=200, metadata=metadata)
            except OSError as error:
                raise ValueRefused(f"{one}: could not be written: {error.strerror}") from error
    return paths


@contextmanager
def theme(dark: bool) -> Iterator[None]:
    """Use matplotlib's own light or dark style and our colours, whatever a user's settings are."""
    from matplotlib import style
    from matplotlib.rcsetup import cycler

    paper = DARK_PAPER if dark else PAPER
    ours = {
        "axes.prop_cycle": cycler(color=DARK if dark else LIGHT),
        "figure.facecolor": paper,
        "axes.facecolor": paper,
        "savefig.facecolor": paper,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "grid.color": "#8884",
        "font.size": 9,
        "axes.titlesize": 9,
        "lines.markersize": 4,
        "lines.linewidth": 1.5,
        "legend.frameon": False,
        "text.parse_math": False,
        "svg.hashsalt": "mlx_stream",
    }
    with style.context(["default", *(["dark_background"] if dark else []), ours]):
        yield


def make_figure(report: Report) -> "Figure":
    """Return a report's chart; raise ValueRefused if its experiment or a figure is missing."""
    from matplotlib.figure import Figure

    if report.experiment not in CHARTS or not report.rows:
        raise ValueRefused(f"no chart of {report.experiment!r}: unknown, or without rows")
    title, heights, draw = CHARTS[report.experiment]
    figure = Figure(figsize=(WIDTH, 1.3 + sum(heights)), layout="constrained")
    found = figure.subplots(len(heights), sharex=True, height_ratios=heights, squeeze=False)
    panels: list[Axes] = [*found[:, 0]]
    try:
        draw(panels, report)
        figure.suptitle(title, x=0.01, ha="left", weight="bold")
        panels[0].set_title(setting_of(report.about))
        figure.supxlabel(machine_of(report.about), x=0.01, ha="left", size=8, alpha=0.7)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueRefused(f"no chart: the report lacks figures, or has others: {error}") from error
    entries: dict[str, Any] = {}  # of all panels, each name once
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    if len(entries) > 1:
        figure.legend(entries.values(), entries.keys(), loc="outside right upper")
    return figure


def setting_of(about: Row) -> str:
    parts = [about.get("model"), about.get("dtype"), "quantized" if about.get("quantized") else ""]
    parts += [", ".join(about.get("texts", ()))]
    parts += [f"{about['sinks']} sinks"] if "sinks" in about else []
    parts += [f"window {about['window']:,}"] if "window" in about else []
    return " · ".join(part for part in parts if part)


def machine_of(about: Row) -> str:
    machine = about.get("machine", {})
    versions = [f"{name} {machine[name]}" for name in ("mlx_stream", "mlx") if name in machine]
    return " · ".join([str(machine.get("device", "")), *versions])


def column(rows: Sequence[Row], key: str, missing: float = math.nan) -> np.ndarray:
    """Return a figure of every row; `missing` stands for None."""
    return np.array([missing if row[key] is None else float(row[key]) for row in rows])


def style_of(name: str) -> dict[str, Any]:
    """Return the look of a line: of the cache that its name begins with."""
    kind = name.split(",")[0]
    place = NAMES.index(kind) if kind in NAMES else len(NAMES) - 1
    look = {"color": f"C{place % len(LIGHT)}", "marker": MARKERS[place], "label": name}
    return look if name in NAMES else look | {"ls": "--", "mfc": "none"}


def log_scale(axes: "Axes", values: Values, label: str) -> None:
    """Scale y by logarithm, over a factor of 4 at least: what is nearly flat looks flat."""
    from matplotlib.ticker import LogLocator, NullLocator

    finite = [value for value in values if value < math.inf] or [10.0]
    low, high = min(finite), max(finite)
    middle = math.sqrt(low * high)
    axes.set(yscale="log", ylabel=f"{label} (log)")
    axes.set_ylim(min(low / 1.2, middle / 2), max(high * 1.3, middle * 2))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:,.7g}")


def plot(axes: "Axes", x: np.ndarray, y: np.ndarray, name: str) -> None:
    """Draw a line, not through NaN, and infinity as a triangle at the top edge."""
    style, infinite = style_of(name), np.isinf(y)
    axes.plot(x, np.where(infinite, math.nan, y), markevery=len(x) // 25 + 1, **style)
    if infinite.any():
        at_top = {"transform": axes.get_xaxis_transform(), "clip_on": False}
        axes.plot(x[infinite], np.ones(infinite.sum()), "^", color=style["color"], **at_top)


def write_values(axes: "Axes", x: Values, y: Values, form: str) -> None:
    """Write a value above each point."""
    for place, value in zip(x, y, strict=True):
        if math.isfinite(value):
            text = form.format(value)
            axes.annotate(text, (place, value), (0, 6), textcoords="offset points", ha="center")


def draw_reading(panels: Sequence["Axes"], report: Report) -> None:
    """Draw perplexity, speed and memory, one below the other, over the tokens read."""
    from matplotlib.ticker import EngFormatter

    log_scale(panels[0], column(report.rows, "perplexity", math.inf), "perplexity")
    for name in dict.fromkeys(row.get("cache", "stream") for row in report.rows):
        rows = [row for row in report.rows if row.get("cache", "stream") == name]
        x = column(rows, "tokens")
        losses = column(rows, "perplexity", math.inf)
        speeds, memory = column(rows, "tokens_per_second"), column(rows, "active_bytes")
        for axes, y in zip(panels, (losses, speeds, memory / 1e6), strict=True):
            plot(axes, x, y, name)
    panels[1].set(ylabel="tokens/s", ylim=(0, None))
    panels[2].set(ylabel="memory (MB)", ylim=(0, None), xlabel="tokens read")
    panels[2].xaxis.set_major_formatter(EngFormatter(sep=""))
    last = column(report.rows, "tokens").max()
    panels[2].set_xlim(0, 1.01 * last)
    for key, dash in (("window", ":"), ("trained_context", "--")):
        place = report.about.get(key) or math.inf
        if 0.01 * last < place <= last:
            for axes in panels:
                label = f"{key.replace('_', ' ')} {place:,}"
                axes.axvline(place, color="0.5", ls=dash, lw=1, label=label)
    if fresh := report.about.get("fresh"):
        y = [fresh["perplexity"]] * 2
        label = f"fresh stream {y[0]:.2f}\n(stream {fresh['stream_perplexity']:.2f})"
        panels[0].plot([fresh["from"], fresh["to"]], y, "|-C1", lw=2.5, zorder=3, label=label)


def draw_shapes(panels: Sequence["Axes"], report: Report) -> None:
    """Draw perplexity over sinks and windows, each shape a step; for windows their memory too."""
    rows = report.rows
    losses, x = column(rows, "perplexity", math.inf), np.arange(len(rows), dtype=float)
    log_scale(panels[0], losses, "perplexity")
    plot(panels[0], x, losses, "stream")
    write_values(panels[0], x, losses, "{:,.4g}")
    if len(panels) > 1:
        memory = column(rows, "cache_bytes") / 1e6
        plot(panels[1], x, memory, "stream")
        write_values(panels[1], x, memory, "{:,.4g}")
        panels[1].set(ylabel="cache (MB)", ylim=(0, 1.2 * memory.max()))
    panels[-1].set_xticks(x, [f"{row['sinks']:,} + {row['window']:,}" for row in rows])
    panels[-1].set(xlabel="sinks + window", xlim=(-0.5, len(rows) - 0.5))


def draw_latency(panels: Sequence["Axes"], report: Report) -> None:
    """Draw the median time of each method, with a whisker to the 99th percentile."""
    (axes,), rows = panels, report.rows
    log_scale(axes, [*column(rows, "p50_ms"), *column(rows, "p99_ms")], "ms per token")
    ours = {row["cache"]: row["p50_ms"] for row in rows if row["method"] == "stream"}
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        if method == "stream, plain":  # only a control
            continue
        sizes, typical = column(mine, "cache"), column(mine, "p50_ms")
        above = column(mine, "p99_ms") - typical
        axes.errorbar(sizes, typical, [0 * above, above], capsize=2, **style_of(method))
        if method == "recompute":
            times = [f"{row['p50_ms'] / ours[row['cache']]:.3g}x stream" for row in mine]
            for size, y, text in zip(sizes, typical, times, strict=True):
                axes.annotate(text, (size, y), (0, -14), textcoords="offset points", ha="center")
    axes.set_xscale("log", base=2)
    axes.set_xticks([*ours], [f"{size:,}" for size in ours])
    axes.set(xlabel="tokens in the cache (log)", xmargin=0.08)


def draw_streameval(panels: Sequence["Axes"], report: Report) -> None:
    """Draw the share of right answers at each distance."""
    (axes,), rows = panels, sorted(report.rows, key=lambda row: row["lines_back"])
    x = np.arange(len(rows), dtype=float)
    for rule in ("likelihood", "generation"):
        plot(axes, x, 100 * column(rows, rule), rule)
    chance = 100 / report.about["candidates"]
    axes.axhline(chance, color="0.5", ls="--", lw=1, label=f"chance: {chance:.3g} %")
    outside = [place for place, row in zip(x, rows, strict=True) if not row["inside"]]
    if outside:
        axes.axvspan(
            outside[0] - 0.5, x[-1] + 0.5, color="0.5", alpha=0.15, label="left the window"
        )
    axes.set_xticks(x, [f"{row['lines_back']:,}\n{row['tokens_back']:,.0f}" for row in rows])
    axes.set(xlabel="lines, tokens back", xlim=(-0.5, x[-1] + 0.5))
    axes.set(ylabel="right answers (%)", ylim=(-2, 104))


Draw = Callable[[Sequence["Axes"], Report], None]
READING = (1.9, 1.1, 1.1)
CHARTS: dict[str, tuple[str, Sequence[float], Draw]] = {  # title, heights in inches, function
    "perplexity": ("Perplexity, speed and memory of one text", READING, draw_reading),
    "endurance": ("Perplexity, speed and memory of one stream", READING, draw_reading),
    "sinks": ("Perplexity by number of sinks", (2.8,), draw_shapes),
    "windows": ("Perplexity and memory by size of the window", (1.9, 1.4), draw_shapes),
    "latency": ("Time of one more token, by size of the cache", (3.2,), draw_latency),
    "streameval": ("Right answers by distance", (2.8,), draw_streameval),
}
