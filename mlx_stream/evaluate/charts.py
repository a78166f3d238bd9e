"""Draws reports as charts, light and dark; uses matplotlib (an extra) and measures nothing.

Nothing is smoothed. Colours, layout and scales are matplotlib's; lines also differ in their
markers.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mlx_stream.errors import ValueRefused
from mlx_stream.evaluate.report import Report, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Panels = Sequence[Axes]

WIDTH = 8.3  # in inches, at 100 pixels per inch: the width of a README on GitHub
MARKERS = "os^vDX*P"


def check_plot(path: Path) -> None:
    """Raise ValueRefused, before hours of measuring, if a chart could not be written to `path`."""
    if path.suffix.lower() not in (".png", ".svg"):
        raise ValueRefused(f"{path}: the name of a chart must end in .png or .svg")
    if not path.parent.is_dir():
        raise ValueRefused(f"{path}: no such folder: {path.parent}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueRefused("--plot needs matplotlib: pip install 'mlx_stream[eval]'") from error


def draw_chart(report: Report, path: Path) -> list[Path]:
    """Write a report's light chart to `path` and its dark one beside it; return both paths.

    Raises ValueRefused if there is no chart for the report or a file cannot be written.
    """
    check_plot(path)
    paths = [path, path.with_name(f"{path.stem}-dark{path.suffix}")]
    undated = {"Date": None} if path.suffix.lower() == ".svg" else None
    for one, style in zip(paths, ("tableau-colorblind10", "dark_background"), strict=True):
        with theme(style):
            figure = make_figure(report)
            try:
                figure.savefig(one, dpi=200, metadata=undated)
            except OSError as error:
                raise ValueRefused(f"{one}: could not be written: {error.strerror}") from error
    return paths


@contextmanager
def theme(name: str) -> Iterator[None]:
    """Use one of matplotlib's styles with our markers, instead of the user's settings."""
    from matplotlib import rcParams, style
    from matplotlib.rcsetup import cycler

    with style.context(["default", name]):
        colours = rcParams["axes.prop_cycle"][: len(MARKERS)]
        rcParams["axes.prop_cycle"] = colours + cycler(marker=[*MARKERS])
        rcParams["axes.grid"] = True
        rcParams["font.size"] = 9
        rcParams["lines.markersize"] = 4
        rcParams["text.parse_math"] = False  # a file's name may contain dollar signs
        rcParams["svg.hashsalt"] = "mlx_stream"
        yield


def make_figure(report: Report) -> "Figure":
    """Return a report's chart; raise ValueRefused if it is of an unknown kind or lacks values."""
    from matplotlib.figure import Figure

    if report.experiment not in CHARTS or not report.rows:
        raise ValueRefused(f"cannot draw {report.experiment!r}: it is unknown or has no rows")
    title, count, draw = CHARTS[report.experiment]
    figure = Figure(figsize=(WIDTH, 2 + 1.5 * count), layout="constrained")
    panels: list[Axes] = [*figure.subplots(count, sharex=True, squeeze=False)[:, 0]]
    try:
        draw(panels, report)
        panels[0].set_title(f"{title}\n{caption(report.about)}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueRefused(
            f"cannot draw this report: figures are missing or unexpected: {error}"
        ) from error
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def caption(about: Row) -> str:
    """Return a line that says what was measured and on which machine."""
    machine = about.get("machine", {})
    parts = [about.get("model"), about.get("dtype"), *about.get("texts", ())]
    parts += [f"{about[key]:,} {key}" for key in ("sinks", "window") if key in about]
    parts += [machine.get("device"), f"mlx {machine['mlx']}" if "mlx" in machine else ""]
    return " · ".join(part for part in parts if part)


def column(rows: Sequence[Row], key: str) -> np.ndarray:
    """Return the values of `key` in all rows; None and infinities are not drawn."""
    return np.array([math.nan if row[key] is None else float(row[key]) for row in rows])


def log_scale(axes: "Axes", label: str) -> None:
    """Use a logarithmic y axis spanning at least a factor of 4, so nearly flat data looks flat."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set(yscale="log", ylabel=f"{label} (log)")
    low, high = axes.get_ylim()
    middle = math.sqrt(low * high)
    axes.set_ylim(min(low, middle / 2), max(high, middle * 2))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:,.7g}")


def draw_reading(panels: "Panels", report: Report) -> None:
    """Draw perplexity, speed and memory against the tokens read, one below the other."""
    losses, speed, memory = panels
    for name in dict.fromkeys(row.get("cache", "stream") for row in report.rows):
        rows = [row for row in report.rows if row.get("cache", "stream") == name]
        x = column(rows, "tokens")
        losses.plot(x, column(rows, "perplexity"), label=name)
        speed.plot(x, column(rows, "tokens_per_second"))
        memory.plot(x, column(rows, "active_bytes") / 1e6)
    for key, dash in (("window", ":"), ("trained_context", "--")):
        place = report.about.get(key) or math.inf
        if place <= column(report.rows, "tokens").max():
            for axes in panels:
                label = f"{key.replace('_', ' ')} {place:,}"
                axes.axvline(place, color="0.5", ls=dash, lw=1, label=label)
    if fresh := report.about.get("fresh"):
        y = fresh["perplexity"]
        losses.plot([fresh["from"], fresh["to"]], [y, y], label=f"fresh stream {y:.2f}")
    log_scale(losses, "perplexity")
    speed.set(ylabel="tokens/s", ylim=(0, None))
    memory.set(ylabel="memory (MB)", ylim=(0, None), xlabel="tokens read")
    memory.xaxis.set_major_formatter("{x:,.0f}")


def draw_shapes(panels: "Panels", report: Report) -> None:
    """Draw perplexity against sinks or windows, evenly spaced, and memory against windows."""
    shapes = [f"{row['sinks']:,} + {row['window']:,}" for row in report.rows]
    panels[0].plot(shapes, column(report.rows, "perplexity"), label="stream")
    log_scale(panels[0], "perplexity")
    if len(panels) > 1:
        panels[1].plot(shapes, column(report.rows, "cache_bytes") / 1e6)
        panels[1].set(ylabel="cache (MB)", ylim=(0, None))
    panels[-1].set(xlabel="sinks + window")


def draw_latency(panels: "Panels", report: Report) -> None:
    """Draw the median time of each method, with a whisker to the 99th percentile."""
    (axes,) = panels
    for method in dict.fromkeys(row["method"] for row in report.rows):
        rows = [row for row in report.rows if row["method"] == method]
        if method != "stream, plain":  # this is only a control
            typical = column(rows, "p50_ms")
            above = column(rows, "p99_ms") - typical
            sizes = [f"{row['cache']:,}" for row in rows]
            axes.errorbar(
                sizes, typical, [[0.0] * len(sizes), above.tolist()], capsize=2, label=method
            )
    log_scale(axes, "ms per token")
    axes.set(xlabel="tokens in the cache")


def draw_streameval(panels: "Panels", report: Report) -> None:
    """Draw the share of right answers at each distance."""
    (axes,), rows = panels, report.rows
    distances = [f"{row['lines_back']:,}\n{row['tokens_back']:,.0f}" for row in rows]
    for rule in ("likelihood", "generation"):
        axes.plot(distances, 100 * column(rows, rule), label=rule)
    chance = 100 / report.about["candidates"]
    axes.axhline(chance, color="0.5", ls="--", lw=1, label=f"chance: {chance:.3g}%")
    outside = [place for place, row in enumerate(rows) if not row["inside"]]
    if outside:
        edges = outside[0] - 0.5, len(rows) - 0.5
        axes.axvspan(*edges, color="0.5", alpha=0.15, label="left the window")
    axes.set(xlabel="lines, tokens back", ylabel="right answers (%)", ylim=(-2, 104))


Draw = Callable[["Panels", Report], None]
CHARTS: dict[str, tuple[str, int, Draw]] = {  # title, number of panels, function
    "perplexity": ("Perplexity, speed and memory of one text", 3, draw_reading),
    "endurance": ("Perplexity, speed and memory of one stream", 3, draw_reading),
    "sinks": ("Perplexity by number of sinks", 1, draw_shapes),
    "windows": ("Perplexity and memory by window size", 2, draw_shapes),
    "latency": ("Time per token by cache size", 1, draw_latency),
    "streameval": ("Right answers by distance", 1, draw_streameval),
}
