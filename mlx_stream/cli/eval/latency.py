"""`mlx_stream eval latency`: time per token by cache size, the paper's figure 10."""

from typing import Annotated

from typer import Option

from mlx_stream.cli import options
from mlx_stream.cli.eval import common
from mlx_stream.program.exits import notify

COLUMNS = (
    ("cache", "cache", ","),
    ("method", "method", ""),
    ("p50_ms", "p50 ms", ",.1f"),
    ("p95_ms", "p95 ms", ",.1f"),
    ("p99_ms", "p99 ms", ",.1f"),
    ("max_ms", "longest ms", ",.1f"),
    ("steps", "steps", ","),
)


@options.verb
def latency(
    *,
    model: options.DefaultModelArgument = None,
    cache: Annotated[
        list[str] | None,
        Option(
            metavar="TOKENS[,steps=N]",
            help="Size of the cache, including 4 sinks; repeatable. "
            "Default: 256, 512, 1024, 2048, 4096.",
        ),
    ] = None,
    steps: Annotated[int, Option(help="Steps timed at each size.")] = 300,
    loading: options.MeasuredLoadOptions,
    output: common.OutputOptions,
) -> None:
    """Measure the time per token at several cache sizes (the paper's figure 10).

    Streaming and mlx-lm's rotating cache are timed in turn, then recompute, which reads the whole
    window again for each token. The stream is re-anchored once, halfway through its steps, and 20
    more re-anchorings are timed, alternating with plain steps.
    """
    from mlx_stream.evaluate.bench import SINKS
    from mlx_stream.evaluate.latency import findings, measure_latency
    from mlx_stream.evaluate.mlx_lm import load_peer, why_no_peer
    from mlx_stream.evaluate.report import Report, facts
    from mlx_stream.hub.resolve import resolve

    output.check()
    asked: dict[int, int] = {}
    for one in cache or ["256", "512", "1024", "2048", "4096"]:
        size, settings = common.parse_cache(one, ["steps"])
        asked[common.whole_number("--cache", size, SINKS + 1)] = settings.get("steps", steps)
    loaded = loading.load(model)
    sizes = {
        sum(loaded.resolve_window(SINKS, size - SINKS, notify)): count
        for size, count in asked.items()
    }
    folder = resolve(loaded.name, notify)
    peer, notes = None, []
    if reason := why_no_peer(folder):
        notes.append(f"mlx-lm: not measured, because {reason}")
    else:
        peer = load_peer(folder, loaded)
    rows, cut = common.collecting_rows(measure_latency(loaded, peer, sizes, notify))
    if cut:
        whole = {row["cache"] for row in rows if row["method"] == "recompute"}
        rows = [row for row in rows if row["cache"] in whole]
        if not rows:
            raise cut
    report = Report("latency", facts(loaded, sinks=SINKS), rows, [*findings(rows), *notes])
    output.publish(report, COLUMNS, cut=cut)
