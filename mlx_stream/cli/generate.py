"""`mlx_stream generate`: one completion of a text."""

import sys
from typing import Annotated

import typer

from mlx_stream.cli import options
from mlx_stream.cli.terminal import progress_bar, read_text
from mlx_stream.program.exits import exits_cleanly, notify


@exits_cleanly
@options.grouped
def generate(
    *,
    prompt: Annotated[
        str, typer.Option("-p", "--prompt", help="The text to go on from; - reads standard input.")
    ],
    model: options.ModelArgument = "starter",
    max_tokens: options.MaxTokens = 256,
    sampling: options.SamplingOptions,
    stop: options.Stop = None,
    attended: options.WindowOptions,
    speculate: options.Speculate = None,
    draft: options.Draft = None,
    loading: options.LoadOptions,
    stats: options.ShowStats = False,
    json: options.AsJson = False,
) -> None:
    """Continue a text of any length, as it is: no chat template."""
    from mlx_stream.cli.report import print_json, print_stats, stats_as_json
    from mlx_stream.generate.completion import stream
    from mlx_stream.generate.stats import Stats

    chosen = sampling.as_sampling()
    text = read_text("-") if prompt == "-" else prompt
    loaded = loading.load(model)
    guessing = loading.load(draft) if draft else None
    counts = Stats()
    pieces: list[str] = []
    finish = None
    with progress_bar("reading") as progress:
        for piece in stream(
            loaded,
            text,
            max_tokens,
            chosen,
            stop or (),
            attended.sinks,
            attended.window,
            counts,
            notify,
            progress,
            attended.kv_bits,
            speculate,
            guessing,
        ):
            finish = piece.finish
            if json:
                pieces.append(piece.text)
            else:
                sys.stdout.write(piece.text)
                sys.stdout.flush()
    if json:
        print_json({"text": "".join(pieces), "finish": finish, **stats_as_json(counts)})
    else:
        print()
    if stats:
        print_stats(counts)
