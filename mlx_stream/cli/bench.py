"""`mlx_stream bench`: speed beside mlx-lm's, in one process, steps in turn."""

from collections.abc import ItemsView
from typing import Annotated, Any

import typer

from mlx_stream.cli import options
from mlx_stream.cli.report import print_json, print_table
from mlx_stream.program.exits import exits_cleanly, fail, notify

PEERS = ("mlx-lm",)
Windows = ItemsView[str, dict[str, Any]]


@exits_cleanly
@options.grouped
def bench(
    *,
    model: options.ModelArgument = "starter",
    against: Annotated[str, typer.Option("--against", help="The peer: mlx-lm.")] = "mlx-lm",
    window: Annotated[
        list[int] | None,
        typer.Option("--window", help="May be given several times. Default: 512, 1,024 and 4,096."),
    ] = None,
    pairs: Annotated[int, typer.Option("--pairs", help="Decode steps timed of each.")] = 40,
    chunk: Annotated[
        int | None, typer.Option("--chunk", help="Tokens of a prefill step. Default: as we read.")
    ] = None,
    prefill: Annotated[
        int | None,
        typer.Option("--prefill", help="Also read a text of this many tokens through each window."),
    ] = None,
    prefill_chunk: Annotated[
        list[int] | None,
        typer.Option(
            "--prefill-chunk",
            help="Tokens of a step of --prefill. May be given several times: the best of each is "
            "compared too. Default: as we read.",
        ),
    ] = None,
    loading: options.MeasuredLoadOptions,
    json: options.AsJson = False,
) -> None:
    """Time decoding and prefill side by side with mlx-lm.

    Windows are full, steps are taken in turn. mlx-lm gets bounded caches by hand. A ratio is its
    time over ours: above 1, ours is faster. Decoding is timed from a token to the next one; beside
    it stand what a step must read against how fast memory is read here, and Python's part.
    """
    from mlx_stream import backend
    from mlx_stream.evaluate.bench import bench as run
    from mlx_stream.evaluate.mlx_lm import load_peer
    from mlx_stream.evaluate.prefill_speed import best_of, check_prefill, prefills
    from mlx_stream.hub.resolve import resolve

    if against not in PEERS:
        fail(f"--against must be one of {', '.join(PEERS)}, not {against!r}")
    if prefill is not None:
        check_prefill(prefill, prefill_chunk or [])
    windows = window or [512, 1024, 4096]
    loaded = loading.load(model)
    for one in windows:
        loaded.resolve_window(None, one)
    peer = load_peer(resolve(model, notify), loaded)
    results = run(loaded, peer, windows, pairs, chunk, notify)
    if prefill is not None:
        results["prefill"] = prefills(loaded, peer, windows, prefill, prefill_chunk or [], notify)
        results["prefill_best"] = best_of(results["prefill"])
    if json:
        about = {"model": model, "dtype": loading.dtype, "quantized": loaded.quantized}
        print_json({**about, "against": against, **results, "machine": backend.describe()})
        return
    print(f"{model}, {loading.dtype}{', quantized' if loaded.quantized else ''}")
    windows_found = results["windows"].items()
    print_times(windows_found)
    print_python(windows_found)
    print_bytes(windows_found, results["read"])
    if prefill is not None:
        print_prefill(results["prefill"], results["prefill_best"])


def print_times(windows: Windows) -> None:
    rows = [
        [
            one,
            kind,
            f"{result[kind]['ours_ms'][1]:.1f}",
            f"{result[kind]['mlx_lm_ms'][1]:.1f}",
            f"{result[f'{kind}_ratio']:.3f}",
            "{0:.3f} to {2:.3f}".format(*result[kind]["ratio_quartiles"]),
            str(result[kind]["pairs"]),
        ]
        for one, result in windows
        for kind in ("decode", "step", "prefill")
    ]
    print_table(["window", "step", "ours ms", "mlx-lm ms", "ratio", "quartiles", "pairs"], rows)


def print_python(windows: Windows) -> None:
    from mlx_stream import backend

    proxy = "" if backend.on_metal() else " (a proxy: the CPU backend expands what Metal fuses)"
    print(f"\nof a decode step: Python until its graph stands, and the graph's nodes{proxy}")
    rows = [
        [
            one,
            f"{python['ours_ms'][1]:.2f}",
            f"{python['mlx_lm_ms'][1]:.2f}",
            f"{python['share']:.3f}",
            f"{python['ours_nodes']:,}",
            f"{python['mlx_lm_nodes']:,}",
            f"{python['node_share']:.3f}",
        ]
        for one, python in ((one, result["python"]) for one, result in windows)
    ]
    columns = ["window", "ours ms", "mlx-lm ms", "share", "ours nodes", "mlx-lm nodes", "share"]
    print_table(columns, rows)


def print_bytes(windows: Windows, read: dict[str, Any]) -> None:
    rate = f"{read['bytes_per_second'] / 1e9:.1f} GB/s here ({read['operation']})"
    print(f"\nof a decode step: what it must read; memory is read at {rate}")
    rows = [
        [
            one,
            f"{result['bytes']['weights'] / 1e6:,.1f}",
            f"{result['bytes']['cache'] / 1e6:,.1f}",
            f"{result['bytes']['least_ms']:.1f}",
            f"{result['decode']['ours_ms'][1]:.1f}",
            f"{result['bytes']['share_of_limit']:.0%}",
        ]
        for one, result in windows
    ]
    print_table(["window", "weights MB", "ring MB", "at least ms", "ours ms", "of the limit"], rows)


def print_prefill(results: list[dict[str, Any]], best: list[dict[str, Any]]) -> None:
    print(f"\na text of {results[0]['tokens']:,} tokens, read from the beginning, tokens/s")
    rows = [
        [
            f"{one['window']}",
            f"{one['chunk']}",
            f"{one['mlx_lm_chunk']}",
            f"{one['ours_tokens_per_second']:.1f}",
            f"{one['mlx_lm_tokens_per_second']:.1f}",
            f"{one['ratio']:.3f}",
            label,
        ]
        for label, some in (("", results), ("the best of each", best))
        for one in some
    ]
    print_table(["window", "chunk", "mlx-lm chunk", "ours", "mlx-lm", "ratio", ""], rows)
