"""Draws reports as charts, light and dark; knows matplotlib (an extra) and measures nothing.

Nothing is smoothed, and infinity is a triangle at the top edge. Reports may come from files: what
is drawn is checked. Colours follow Okabe and Ito; lines also differ by dashes, marker and name.
"""

import io
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_stream.errors import ValueRefused
from mlx_stream.evaluate.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Names = Sequence[str]
Figures = Sequence[float] | np.ndarray

WIDTH = 8.3  # inches of 100 pixels: what GitHub shows of a README
LEFT, TOP, BOTTOM, GAP = 0.75, 0.9, 0.9, 0.17  # inches around panels and between them
POINT = 72 / 100  # points of a pixel
LARGEST = 1e18  # more than anything measured
INKS = "paper   text    muted   grid    shade   blue    red     green   brown   purple"
LIGHT = "#ffffff #1f2328 #59636e #e4e7eb #eff1f3 #0067b1 #c2410c #00795a #8a5a00 #a2387c"
DARK = "#0d1117 #e6edf3 #9aa4af #262c35 #1b212b #58b0ff #ff8a5c #3ccf9e #e3b341 #e391c5"
STYLES = {  # colour, dashes, width, marker; a line has the first that its name begins with
    "stream, re-anchoring": ("purple", ":", 1.6, "D"),
    "stream": ("blue", "-", 2.6, "o"),
    "fresh": ("text", "-", 0.8, "."),
    "dense": ("red", "-", 1.6, "s"),
    "window": ("purple", (0, (1, 1.4)), 1.8, "v"),
    "recompute": ("green", (0, (5, 1.5, 1, 1.5)), 1.6, "^"),
    "mlx-lm, chunk": ("brown", (0, (2, 1.2)), 1.6, "P"),
    "mlx-lm": ("brown", (0, (6, 2)), 1.6, "D"),
    "llama.cpp": ("text", (0, (9, 2, 2, 2)), 1.3, "X"),
    "likelihood": ("blue", "-", 1.8, "o"),
    "generation": ("red", (0, (6, 2)), 1.6, "D"),
    "dots": ("blue", "", 0, "o"),
    "": ("muted", "-", 1.3, "*"),
}
ABOUT = {"model": "{}", "dtype": "{}", "quantized": "quantized", "texts": "{}"}
ABOUT |= {"sinks": "{} sinks", "window": "window {}"}
MACHINE = {"device": "{}", "cores": "{} cores", "metal": "Metal"}
MACHINE |= {name: f"{name} {{}}" for name in ("mlx_stream", "mlx", "mlx-lm")}


def check_plot(path: Path) -> None:
    """Raise ValueRefused, before hours of measuring, if no chart could be written to a file."""
    if path.suffix.lower() not in (".png", ".svg"):
        raise ValueRefused(f"{path}: the name of a chart must end in .png or .svg")
    if any(os.path.isdir(one) for one in (path, dark_twin(path))):  # noqa: PTH112
        raise ValueRefused(f"{path}: it or its dark twin is a folder")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ValueRefused("--plot needs matplotlib: pip install 'mlx_stream[eval]'") from error
    write_chart({path: b"", dark_twin(path): b""}, keep=False)


def draw_chart(report: Report, path: Path) -> list[Path]:
    """Write a report's light chart to `path` and its dark one beside it; return both paths.

    The same report gives the same bytes. A failure is a ValueRefused and leaves no half of a file.
    """
    check_plot(path)
    form, files = path.suffix[1:].lower(), {}
    facts = {"Software": None} if form == "png" else {"Date": None, "Creator": None}
    for dark, one in ((False, path), (True, dark_twin(path))):
        drawn, out = make_figure(report, dark), io.BytesIO()
        with theme(dark):
            drawn.savefig(out, format=form, dpi=200, metadata=facts)
        files[one] = out.getvalue()
    write_chart(files)
    return list(files)


def dark_twin(path: Path) -> Path:
    return path.with_name(f"{path.stem}-dark{path.suffix}")


def write_chart(files: dict[Path, bytes], keep: bool = True) -> None:
    """Write all files or none; without `keep`, only find out whether that can be done."""
    partial = {path: path.with_name(f".{path.name}.{os.getpid()}") for path in files}
    paths = list(files)
    try:
        for path in paths:
            partial[path].write_bytes(files[path])
        for path in paths if keep else ():
            partial[path].replace(path)
    except OSError as error:
        raise ValueRefused(f"{paths[0]}: could not be written: {error.strerror}") from error
    finally:
        for one in filter(os.path.lexists, partial.values()):
            one.unlink()


@contextmanager
def theme(dark: bool) -> Iterator[dict[str, str]]:
    """Draw with matplotlib's defaults and our colours, whatever a user's settings are."""
    from matplotlib import style

    ink: dict[str, str] = dict(zip(INKS.split(), (DARK if dark else LIGHT).split(), strict=True))
    ours = {
        "font.size": 9, "lines.markersize": 4.5, "text.parse_math": False, "axes.axisbelow": True,
        "axes.grid": True, "axes.grid.axis": "y", "path.simplify_threshold": 0.8,
        "axes.spines.top": False, "axes.spines.right": False, "grid.color": ink["grid"],
        "svg.fonttype": "path", "svg.hashsalt": "mlx_stream", "text.color": ink["text"],
        "figure.facecolor": ink["paper"], "axes.facecolor": ink["paper"],
        "axes.edgecolor": ink["muted"], "axes.labelcolor": ink["text"],
        "xtick.color": ink["muted"], "ytick.color": ink["muted"],
    }  # fmt: skip
    with style.context(["default", ours]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield ink


def make_figure(report: Report, dark: bool = False) -> "Figure":
    """Return a report's chart; raise ValueRefused where its experiment or a figure is not known."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if report.experiment not in CHARTS or not report.rows:
        raise ValueRefused(f"no chart: {clean(report.experiment)!r} is not known, or without rows")
    if len({str(x.get("cache")) for x in report.rows}) > 20 or len(report.rows) > 10_000:
        raise ValueRefused("no chart: more than 10,000 rows or 20 caches")
    with theme(dark) as ink:
        page = Page(Figure(dpi=100), report, ink, [])
        FigureCanvasAgg(page.figure)  # measures text
        CHARTS[report.experiment](page)
    return page.figure


def clean(value: object) -> str:
    """Return what a report says as one short printable line."""
    text = f"{value:,}" if type(value) is int else str(value)
    text = ", ".join(map(str, value)) if isinstance(value, list) else text
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= 34 else f"{text[:33]}…"


def caption(found: Any, forms: dict[str, str], *more: str) -> str:
    """Say what a report knows of something, each thing in its form."""
    found = found if isinstance(found, dict) else {}
    known = {key: value for key, value in found.items() if value is not None and value is not False}
    parts = [form.format(clean(known[key])) for key, form in forms.items() if key in known]
    return " · ".join(filter(None, [*parts, *more]))


def short(value: float) -> str:
    """Write a figure: infinite, 0, 9.54, 17.9, 192, 5,641."""
    decimals = 0 if value >= 100 or value % 1 == 0 else 1 if value >= 10 else 2
    return f"{value:,.{decimals}f}" if math.isfinite(value) else "infinite"


def along(corners: np.ndarray) -> np.ndarray:
    """Return many points of a line, to find out what it crosses."""
    corners = corners[np.isfinite(corners).all(axis=1)]
    return np.concatenate([corners, *(np.linspace(a, b, 15) for a, b in pairwise(corners))])


@dataclass(frozen=True)
class Page:
    """What a chart is drawn on, from what, in which colours."""

    figure: "Figure"
    report: Report
    ink: dict[str, str]
    words: list[np.ndarray]  # where names of lines are, on all panels

    def column(self, key: str, least: float = 0, empty: Any = None, of: Any = None) -> list[float]:
        """Return a figure of every row, checked; `empty` stands for none, where that may be."""
        found = []
        for i, row in enumerate(of or self.report.rows, 1):
            value = row.get(key)
            none = value is None or (isinstance(value, float) and not value < LARGEST)
            if none and empty is not None:
                value = empty
            elif not isinstance(value, int | float) or not least <= value < LARGEST:
                raise ValueRefused(f"no chart: {key!r}, row {i}, is no figure: {clean(value)!r}")
            found.append(float(value))
        return found

    def names(self, key: str) -> list[str]:
        if not all(isinstance(row.get(key), str) for row in self.report.rows):
            raise ValueRefused(f"no chart: {key!r} of each row must be a name")
        return [clean(row[key]) for row in self.report.rows]

    def panels(self, title: str, *heights: float, beside: Names = (), more: str = "") -> Any:
        """Lay out panels, heights in inches, with room for names beside them."""
        inches = TOP + sum(heights) + GAP * (len(heights) - 1) + BOTTOM
        room = 0.35 + 0.07 * max([0, *(len(name) + 7 for name in beside)])
        self.figure.set_size_inches(WIDTH, inches)
        self.figure.subplots_adjust(
            LEFT / WIDTH, BOTTOM / inches, 1 - room / WIDTH, 1 - TOP / inches,
            hspace=GAP * len(heights) / sum(heights),
        )  # fmt: skip
        about, muted = self.report.about, self.ink["muted"]
        self.figure.text(0.018, 1 - 0.3 / inches, title, size=12, weight="bold")
        self.figure.text(0.018, 1 - 0.53 / inches, caption(about, ABOUT, more), color=muted)
        self.figure.text(0.018, 0.13 / inches, caption(about.get("machine"), MACHINE), color=muted)
        return self.figure.subplots(len(heights), sharex=True, height_ratios=heights)

    def log_axis(self, axes: "Axes", values: Figures, name: str) -> None:
        """Scale y by logarithm, over a factor of 4 at least: what is nearly flat looks flat."""
        finite = [value for value in values if value < math.inf] or [10.0]
        middle = math.sqrt(min(finite) * max(finite))
        low, high = min(min(finite) / 1.5, middle / 2), max(max(finite) * 1.3, middle * 2)
        steps = (1, 1.5, 2, 3, 4, 5, 7) if high < 20 * low else (1, 2, 5) if high < 2e3 * low else 1
        tens = 10.0 ** np.arange(math.floor(math.log10(low)), math.ceil(math.log10(high)))
        places = [place for place in np.outer(tens, steps).flat if low <= place <= high]
        axes.set(yscale="log", ylim=(low, high), ylabel=f"{name} (log)")
        axes.set_yticks([], minor=True)
        axes.set_yticks(places, [f"{place:,.7g}" for place in places])

    def zero_axis(self, axes: "Axes", values: Figures, name: str) -> None:
        most = max((value for value in values if value < math.inf), default=0) or 1
        axes.set(ylim=(0, 1.15 * most), ylabel=name)
        axes.locator_params(axis="y", nbins=4)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.7g}")

    def ticks(self, axes: "Axes", places: Figures, texts: Iterable[str], name: str) -> None:
        axes.set(xlim=(min(places) - 0.45, max(places) + 0.25), xlabel=name)
        shown = sorted(dict(zip(places, texts, strict=True)).items())
        axes.set_xticks(*zip(*shown[:: len(shown) // 13 + 1], strict=True))

    def plot(self, axes: "Axes", names: Names, xs: Figures, ys: Figures, every: int = 0) -> Any:
        """Draw a line for each name: not through NaN, and infinity as a triangle at the top."""
        lines = []
        for name in dict.fromkeys(names):
            rows = zip(names, xs, ys, strict=True)
            found = sorted((x, y) for one, x, y in rows if one == name and not math.isnan(y))
            style = next(style for start, style in STYLES.items() if name.startswith(start))
            colour, dash, width, marker = self.ink[style[0]], *style[1:]
            x, y = np.array(found).reshape(-1, 2).T
            far, top = x[y == math.inf], axes.get_ylim()[1]
            axes.plot(far, 0 * far + top, "^", color=colour, clip_on=False)
            lines += axes.plot(
                x, np.where(y < math.inf, y, math.nan), label=name, color=colour, ls=dash,
                lw=width if len(x) < 60 else 0.9, marker=marker, markevery=every or [-1],
                zorder=3 - (width > 2), clip_on=False,
            )[: len(x)]  # fmt: skip
        return lines

    def show_values(self, axes: "Axes", name: str, xs: Figures, ys: Figures) -> None:
        """Draw a line or dots, in a style, with a value above each point."""
        self.plot(axes, [name] * len(ys), xs, ys, every=1)
        for x, y in zip(xs, ys, strict=True):
            place = (x, min(y, axes.get_ylim()[1]))
            axes.annotate(short(y), place, (0, 7), textcoords="offset points", ha="center")

    def name_ends(self, axes: "Axes", lines: Any) -> None:
        """Write at each line's end what it is: in the margin, or near it where it hides least."""
        (_, floor), (right, _) = axes.bbox.get_points() * POINT
        drawn = [one.get_transform().transform(one.get_path().vertices) for one in axes.lines]
        crossed = [along(one * POINT) for one in drawn]
        for line in sorted(lines, key=lambda line: line.get_xydata()[-1, 1]):
            x, y = line.get_xydata()[-1]
            end, colour = (x, np.nan_to_num(y, nan=axes.get_ylim()[1])), line.get_color()
            tip, text = axes.transData.transform(end) * POINT, f"{line.get_label()}: {short(y)}"
            asides = [right + 18 - tip[0]] if tip[0] > 0.95 * right else [9, 18, 32, 50]
            shifts = np.array([(x, y) for x in asides for y in range(60, -61, -4)])
            taken = np.concatenate([*crossed, *self.words])
            lows, size = tip + shifts - (2, 6), np.array([5.4 * len(text), 12])
            hidden = [((taken > low) & (taken < low + size)).all(axis=1).sum() for low in lows]
            costs = 20 * np.array(hidden) + abs(shifts).sum(axis=1) + 1e6 * (lows[:, 1] < floor)
            shift = shifts[np.argmin(costs)]
            box = tip + shift + size * [(0, -0.4), (1, -0.4), (0, 0.4), (1, 0.4)]
            self.words.append(along(box))
            axes.annotate(
                text, end, shift, textcoords="offset points", va="center", color=colour,
                annotation_clip=False, arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.7,
                "relpos": (0, 0.5), "shrinkA": 0, "shrinkB": 3},
            )  # fmt: skip

    def mark(self, panels: Sequence["Axes"]) -> None:
        """Mark the window and the trained context on all panels, named above the first."""
        high, edge = panels[0].get_xlim()[1], 0.0
        for key, dash, align in (("window", ":", "center"), ("trained_context", "--", "left")):
            place = self.report.about.get(key)
            if type(place) is not int or not high * 0.01 * (dash == ":") < place <= high:
                continue
            for axes in panels:
                axes.axvline(place, color=self.ink["muted"], ls=dash, lw=1, zorder=1)
            label = panels[0].annotate(
                f"{key.replace('_', ' ')} {place:,}", (place, 1), (0, 4), ("data", "axes fraction"),
                "offset points", ha=align, color=self.ink["muted"],
            )  # fmt: skip
            label.set_x(max(0, edge - label.get_window_extent().x0) * POINT)
            edge = label.get_window_extent().x1 + 12


def read_points(page: Page) -> None:
    """Draw perplexity, speed and memory below each other, over the tokens read."""
    from matplotlib.ticker import EngFormatter

    xs, losses = page.column("tokens", 1), page.column("perplexity", 0.1, math.inf)
    endless, last = page.report.experiment == "endurance", max(xs)
    names = ["stream"] * len(xs) if endless else page.names("cache")
    speeds = page.column("tokens_per_second")
    memory = [y / 1e6 for y in page.column("active_bytes", empty=math.nan)]
    beside = [name for name, x in zip(names, xs, strict=True) if x > 0.95 * last]
    title = f"Reading {last:,.0f} tokens: perplexity, speed and memory"
    panels = page.panels(title, 1.8, 1.05, 1.05, beside=beside)
    tokens = caption(page.report.about, {"segment": "tokens read, in segments of {}"})
    panels[2].set(xlim=(0, last), xlabel=tokens or "tokens read")
    panels[2].xaxis.set_major_formatter(EngFormatter(sep=""))
    page.log_axis(panels[0], losses, "perplexity")
    page.zero_axis(panels[1], speeds, "tokens/s")
    page.zero_axis(panels[2], memory, "memory (MB)")
    page.mark(panels)
    for axes, ys in zip(panels, (losses, speeds, memory), strict=True):
        page.name_ends(axes, page.plot(axes, names, xs, ys))
    fresh, red = page.report.about.get("fresh"), page.ink["red"]
    if endless and isinstance(fresh, dict):
        start, stop = (page.column(key, of=[fresh])[0] for key in ("from", "to"))
        keys = ("perplexity", "stream_perplexity")
        new, old = (page.column(key, 0.1, math.inf, [fresh])[0] for key in keys)
        text = f"{start:,.0f} to {stop:,.0f}: stream {short(old)}, fresh stream {short(new)}"
        panels[0].plot([start, stop], [new, new], "|-", color=red, lw=2.5, zorder=4)
        panels[0].set_title(text, loc="right", size=9, pad=4, color=red)


def draw_sinks(page: Page) -> None:
    ys, places = page.column("perplexity", 0.1, math.inf), range(len(page.report.rows))
    axes = page.panels("Perplexity by number of sinks", 3.2)
    (page.log_axis if max(ys) > 3 * min(ys) else page.zero_axis)(axes, ys, "perplexity")
    page.show_values(axes, "dots", places, ys)
    texts = map("{:,.0f} + {:,.0f}".format, page.column("sinks"), page.column("window"))
    page.ticks(axes, places, texts, "sinks + window")


def draw_windows(page: Page) -> None:
    sizes, losses = page.column("window", 1), page.column("perplexity", 0.1, math.inf)
    memory = [y / 1e6 for y in page.column("cache_bytes")]
    panels = page.panels("Perplexity and memory by size of the window", 1.9, 1.4)
    page.log_axis(panels[0], losses, "perplexity")
    page.zero_axis(panels[1], memory, "cache (MB)")
    page.ticks(panels[1], np.log2(sizes), map("{:,.0f}".format, sizes), "window, tokens (log)")
    for axes, ys in zip(panels, (losses, memory), strict=True):
        page.show_values(axes, "stream", np.log2(sizes), ys)


def draw_latency(page: Page) -> None:
    sizes, names = page.column("cache", 1), page.names("method")
    typical, worst = page.column("p50_ms", 1e-6), page.column("p99_ms", 1e-6)
    beside = [name for name, size in zip(names, sizes, strict=True) if size == max(sizes)]
    axes = page.panels("Time of one more token, by size of the cache", 3.5, beside=beside)
    page.log_axis(axes, typical + worst, "ms per token, median to 99th percentile")
    page.ticks(axes, np.log2(sizes), map("{:,.0f}".format, sizes), "tokens in the cache (log)")
    shown = np.where(np.array(names) == "stream, plain", math.nan, typical)  # a mere control
    shift = {name: 0.07 * i for i, name in enumerate(dict.fromkeys(names))}
    xs = np.log2(sizes) + [shift[name] - max(shift.values()) / 2 for name in names]
    lines = page.plot(axes, names, xs, shown, every=1)
    colours = {line.get_label(): line.get_color() for line in lines}
    axes.vlines(xs, typical, worst, colors=[colours.get(name, "none") for name in names], lw=1)
    page.name_ends(axes, lines)
    times = dict(zip(zip(names, sizes, strict=True), typical, strict=True))
    for n in set(sizes):
        ours, again = times.get(("stream", n)), times.get(("recompute", n))
        if ours and again:
            text = f"{short(again / ours)}x faster"
            axes.text(np.log2(n), math.sqrt(ours * again), text, ha="center")


def draw_streameval(page: Page) -> None:
    backs, tokens = page.column("lines_back"), page.column("tokens_back")
    right = page.column("likelihood") + page.column("generation", empty=math.nan)
    chance = 100 / page.column("candidates", 1, of=[page.report.about])[0]
    queries, muted = page.column("queries"), page.ink["muted"]
    places = [sorted(set(backs)).index(back) for back in backs]
    names = ["likelihood"] * len(backs) + ["generation"] * len(backs)
    asked = " to ".join(f"{n:,.0f}" for n in sorted({min(queries), max(queries)}))
    axes = page.panels("Right answers by distance", 3.2, beside=names, more=f"{asked} queries each")
    axes.set(ylim=(0, 104), ylabel="right answers (%)")
    page.ticks(axes, places, map("{:,.0f}\n{:,.0f}".format, backs, tokens), "lines, tokens back")
    inside = zip(places, page.column("inside"), strict=True)
    border = min((place for place, one in inside if not one), default=len(backs)) - 0.5
    if border < max(places):
        axes.axvspan(border, len(backs), color=page.ink["shade"])
        axes.text(border, 105.5, "left the window", color=muted)
    axes.axhline(chance, color=muted, ls="--", lw=1)
    axes.text(-0.4, chance + 1, f"chance: {short(chance)}", color=muted)
    page.name_ends(axes, page.plot(axes, names, places * 2, [100 * y for y in right], every=1))


CHARTS = {
    "perplexity": read_points,
    "endurance": read_points,
    "sinks": draw_sinks,
    "windows": draw_windows,
    "latency": draw_latency,
    "streameval": draw_streameval,
}
