"""`mlx_stream generate`: one completion of a text."""

import sys
from typing import Annotated

import typer

from mlx_stream.cli import options
from mlx_stream.cli.terminal import progress_bar, read_text
from mlx_stream.program.exits import exits_cleanly, notify


@exits_cleanly
def generate(
    prompt: Annotated[
        str, typer.Option("-p", "--prompt", help="The text to go on from; - reads standard input.")
    ],
    model: options.ModelArgument = "starter",
    max_tokens: options.MaxTokens = 256,
    temp: options.Temp = 0.6,
    top_k: options.TopK = 0,
    top_p: options.TopP = 0.9,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = None,
    stop: options.Stop = None,
    window: options.Window = None,
    sinks: options.Sinks = None,
    kv_bits: options.KvBits = None,
    speculate: options.Speculate = None,
    draft: options.Draft = None,
    dtype: options.Dtype = None,
    keep_quantized: options.KeepQuantized = None,
    force: options.Force = False,
    stats: options.ShowStats = False,
    json: options.AsJson = False,
) -> None:
    """Continue a text of any length, as it is: no chat template."""
    from mlx_stream.cli.report import print_json, print_stats, stats_as_json
    from mlx_stream.generate.completion import stream
    from mlx_stream.generate.stats import Stats
    from mlx_stream.load import load
    from mlx_stream.sampling import Sampling

    sampling = Sampling(temp, top_k, top_p, min_p, repetition_penalty, seed)
    text = read_text("-") if prompt == "-" else prompt
    loaded = load(model, dtype, keep_quantized, force, notify)
    guessing = load(draft, dtype, keep_quantized, force, notify) if draft else None
    counts = Stats()
    pieces: list[str] = []
    finish = None
    with progress_bar("reading") as progress:
        for piece in stream(
            loaded,
            text,
            max_tokens,
            sampling,
            stop or (),
            sinks,
            window,
            counts,
            notify,
            progress,
            kv_bits,
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
        print_json(
            {
                "text": "".join(pieces),
                "finish": finish,
                **stats_as_json(counts),
            }
        )
    else:
        print()
    if stats:
        print_stats(counts)
