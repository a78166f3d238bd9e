"""`mlx_stream generate`: one completion of a text."""

import sys
from typing import Annotated

from typer import Option

from mlx_stream.cli import options
from mlx_stream.cli.terminal import progress_bar, read_text
from mlx_stream.program.exits import notify


@options.verb
def generate(
    *,
    prompt: Annotated[
        str, Option("-p", "--prompt", help="The text to continue; - reads standard input.")
    ],
    model: options.DefaultModelArgument = None,
    max_tokens: options.MaxTokens = 256,
    sampling: options.SamplingOptions,
    attended: options.WindowOptions,
    reply: options.ReplyOptions,
    loading: options.LoadOptions,
    stats: options.ShowStats = False,
    json: options.AsJson = False,
) -> None:
    """Continue a text of any length, without a chat template."""
    from mlx_stream.cli.report import print_json, print_stats, stats_as_json
    from mlx_stream.generate.completion import stream
    from mlx_stream.generate.stats import Stats

    chosen = sampling.as_sampling()
    text = read_text("-") if prompt == "-" else prompt
    loaded = loading.load(model)
    draft = loading.load(reply.draft) if reply.draft else None
    counts = Stats()
    pieces: list[str] = []
    finish = None
    with progress_bar("reading") as progress:
        for piece in stream(
            loaded,
            text,
            max_tokens,
            chosen,
            reply.stop or (),
            attended.sinks,
            attended.window,
            counts,
            notify,
            progress,
            attended.kv_bits,
            reply.speculate,
            draft,
        ):
            finish = piece.finish
            pieces.append(piece.text)
            if not json:
                sys.stdout.write(piece.text)
                sys.stdout.flush()
    if json:
        print_json({"text": "".join(pieces), "finish": finish, **stats_as_json(counts)})
    else:
        print()
    if stats:
        print_stats(counts)
