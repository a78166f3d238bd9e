"""`mlx_stream bench`: compares speed with mlx-lm in one process, with alternating steps."""

from typing import Annotated

from typer import Option

from mlx_stream.cli import options
from mlx_stream.cli.report import print_json, print_rows, print_text
from mlx_stream.program.exits import notify

TIMES = (
    ("window", "window", ""),
    ("kind", "step", ""),
    ("ours", "ours ms", ".1f"),
    ("theirs", "mlx-lm ms", ".1f"),
    ("ratio", "ratio", ".3f"),
    ("quartiles", "quartiles", ""),
    ("pairs", "pairs", ""),
)
PYTHON = (
    ("window", "window", ""),
    ("ours", "ours ms", ".2f"),
    ("theirs", "mlx-lm ms", ".2f"),
    ("share", "share", ".3f"),
    ("ours_nodes", "ours nodes", ","),
    ("mlx_lm_nodes", "mlx-lm nodes", ","),
    ("node_share", "share", ".3f"),
)
BYTES = (
    ("window", "window", ""),
    ("weights", "weights MB", "MB"),
    ("cache", "ring MB", "MB"),
    ("least_ms", "at least ms", ".1f"),
    ("ours", "ours ms", ".1f"),
    ("share_of_limit", "of the limit", ".0%"),
)
STREAMS = (
    ("streams", "streams", ""),
    ("shared", "shared ms", ".1f"),
    ("in_turn", "in turn ms", ".1f"),
    ("mlx_lm", "mlx-lm ms", ".1f"),
    ("shared_gain", "speedup", ".2f"),
    ("in_turn_gain", "in turn", ".2f"),
    ("mlx_lm_gain", "mlx-lm's", ".2f"),
    ("ratio", "ratio", ".3f"),
)
PREFILL = (
    ("window", "window", ""),
    ("chunk", "chunk", ""),
    ("mlx_lm_chunk", "mlx-lm chunk", ""),
    ("ours_tokens_per_second", "ours", ".1f"),
    ("mlx_lm_tokens_per_second", "mlx-lm", ".1f"),
    ("ratio", "ratio", ".3f"),
    ("label", "", ""),
)


@options.verb
def bench(
    *,
    model: options.DefaultModelArgument = None,
    window: Annotated[
        list[int] | None,
        Option(
            help="Number of recent tokens to attend to; repeatable. Default: 512, 1,024 and 4,096."
        ),
    ] = None,
    pairs: Annotated[
        int, Option(help="Number of decode steps to time for each project and window.")
    ] = 40,
    chunk: Annotated[int, Option(help="Tokens per prefill step.")] = 128,
    prefill: Annotated[
        int | None, Option(help="Also read a text of this many tokens through each window.")
    ] = None,
    prefill_chunk: Annotated[
        list[int] | None,
        Option(
            help="Tokens per step of --prefill. Repeatable; each project's best size is then "
            "compared too. Default: 128."
        ),
    ] = None,
    streams: Annotated[
        str | None,
        Option(
            help="Numbers of concurrent streams to measure instead, separated by commas, "
            "such as 1,2,4,8. Uses the first window."
        ),
    ] = None,
    loading: options.MeasuredLoadOptions,
    json: options.AsJson = False,
) -> None:
    """Time decoding and prefill side by side with mlx-lm.

    All windows are full, and the projects alternate step by step. mlx-lm is given caches of bounded
    size. A ratio is mlx-lm's time divided by ours: above 1, ours is faster. Decoding is timed from
    one token to the next. The tables also show how much a step must read, how fast this machine
    reads memory, and Python's share.
    """
    from mlx_stream import backend
    from mlx_stream.evaluate.bench import bench as run
    from mlx_stream.evaluate.mlx_lm import load_peer
    from mlx_stream.evaluate.prefill_speed import best_of, check_prefill, prefills
    from mlx_stream.evaluate.shared_speed import shared_speed
    from mlx_stream.hub.resolve import resolve

    chunks = prefill_chunk or [128]
    if prefill is not None:
        check_prefill(prefill, chunks)
    windows = window or [512, 1024, 4096]
    loaded = loading.load(model)
    for one in windows:
        loaded.resolve_window(None, one)
    peer = load_peer(resolve(loaded.name, notify), loaded)
    about = {"model": loaded.name, "dtype": loading.dtype, "quantized": loaded.quantized}
    if streams is not None:
        rows = shared_speed(loaded, peer, numbers(streams), windows[0], pairs, notify)
        if json:
            print_json({**about, "streams": rows, "machine": backend.describe()})
            return
        print_text(
            "time for one token of each stream: in a shared step, in turn, in mlx-lm's batch"
        )
        medians = {one: f"{one}_ms" for one in ("shared", "in_turn", "mlx_lm")}
        shown = [{**row, **{one: row[name][1] for one, name in medians.items()}} for row in rows]
        print_rows(shown, STREAMS)
        return
    results = run(loaded, peer, windows, pairs, chunk, notify)
    if prefill is not None:
        results["prefill"] = prefills(loaded, peer, windows, prefill, chunks, notify)
        results["prefill_best"] = best_of(results["prefill"])
    if json:
        print_json({**about, "against": "mlx-lm", **results, "machine": backend.describe()})
        return
    print(f"{loaded.name}, {loading.dtype}{', quantized' if loaded.quantized else ''}")
    found = results["windows"].items()
    times = [
        {
            "window": one,
            "kind": kind,
            "ours": result[kind]["ours_ms"][1],
            "theirs": result[kind]["mlx_lm_ms"][1],
            "ratio": result[f"{kind}_ratio"],
            "quartiles": "{0:.3f} to {2:.3f}".format(*result[kind]["ratio_quartiles"]),
            "pairs": result[kind]["pairs"],
        }
        for one, result in found
        for kind in ("decode", "step", "prefill")
    ]
    print_rows(times, TIMES)
    proxy = "" if backend.on_metal() else " (a proxy: the CPU backend expands what Metal fuses)"
    print_text(f"\nPython time to build a decode step's graph, and the graph's nodes{proxy}")
    built = [(one, result["python"]) for one, result in found]
    medians = ("ours", "ours_ms"), ("theirs", "mlx_lm_ms")
    print_rows(
        [{"window": one, **p, **{k: p[v][1] for k, v in medians}} for one, p in built], PYTHON
    )
    read = results["read"]
    rate = f"{read['bytes_per_second'] / 1e9:.1f} GB/s here ({read['operation']})"
    print_text(f"\nbytes that a decode step must read; memory is read at {rate}")
    ours = {one: result["decode"]["ours_ms"][1] for one, result in found}
    print_rows([{"window": w, "ours": ours[w], **result["bytes"]} for w, result in found], BYTES)
    if prefill is not None:
        print_text(f"\na text of {prefill:,} tokens, read from the beginning, tokens/s")
        best = [{**one, "label": "the best of each"} for one in results["prefill_best"]]
        print_rows([*({**one, "label": ""} for one in results["prefill"]), *best], PREFILL)


def numbers(text: str) -> list[int]:
    """Return the integers in a string like "1,2,4"; 0 for a part that is not an integer."""
    return [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
