"""`mlx_stream bench`: speed beside mlx-lm's, in one process, steps in turn."""

from typing import Annotated

import typer

from mlx_stream.cli import options
from mlx_stream.cli.terminal import fail, guarded, note

PEERS = ("mlx-lm",)


@guarded
def bench(
    model: options.ModelArgument = "starter",
    against: Annotated[str, typer.Option("--against", help="The peer: mlx-lm.")] = "mlx-lm",
    window: Annotated[
        list[int] | None,
        typer.Option("--window", help="May be given several times. Default: 512 and 4,096."),
    ] = None,
    pairs: Annotated[int, typer.Option("--pairs", help="Decode steps timed of each.")] = 40,
    chunk: Annotated[int, typer.Option("--chunk", help="Tokens of a prefill step.")] = 128,
    dtype: Annotated[
        str,
        typer.Option("--dtype", metavar="TYPE", help="Both compute in this type."),
    ] = "float32",
    keep_quantized: options.KeepQuantized = False,
    force: options.Force = False,
    json: options.AsJson = False,
) -> None:
    """Time decoding and prefill side by side with mlx-lm.

    Windows are full, steps are taken in turn. mlx-lm gets bounded caches by hand. A ratio is its
    time over ours: above 1, ours is faster.
    """
    from mlx_stream import backend, hub
    from mlx_stream.cli.report import print_json, print_table
    from mlx_stream.evaluate.bench import bench as run
    from mlx_stream.evaluate.peer import load_peer
    from mlx_stream.load import load

    if against not in PEERS:
        fail(f"--against must be one of {', '.join(PEERS)}, not {against!r}")
    windows = window or [512, 4096]
    loaded = load(model, dtype, keep_quantized, force, note)
    for one in windows:
        loaded.resolve_window(None, one)
    peer = load_peer(hub.resolve(model, note), loaded)
    results = run(loaded, peer, windows, pairs, chunk, note)
    if json:
        about = {"model": model, "dtype": dtype, "quantized": loaded.quantized, "against": against}
        print_json({**about, "windows": results, "machine": backend.describe()})
        return
    print(f"{model}, {dtype}{', quantized' if loaded.quantized else ''}")
    rows = []
    for one, result in results.items():
        for kind in ("decode", "prefill"):
            times = result[kind]
            low, _, high = times["ratio_quartiles"]
            rows.append(
                [
                    one,
                    kind,
                    f"{times['ours_ms'][1]:.1f}",
                    f"{times['mlx_lm_ms'][1]:.1f}",
                    f"{result[f'{kind}_ratio']:.3f}",
                    f"{low:.3f} to {high:.3f}",
                    str(times["pairs"]),
                ]
            )
    print_table(["window", "step", "ours ms", "mlx-lm ms", "ratio", "quartiles", "pairs"], rows)
