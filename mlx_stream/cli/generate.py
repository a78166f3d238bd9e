"""`mlx_stream generate`: one completion of a text."""

import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from mlx_stream.cli import options
from mlx_stream.cli.terminal import progress_bar, read_text
from mlx_stream.errors import ValueRefused
from mlx_stream.program.exits import notify

if TYPE_CHECKING:
    from mlx_stream.generate.requests import Coroutine
    from mlx_stream.load import Model
    from mlx_stream.text.pieces import Piece


@options.verb
def generate(
    *,
    prompt: Annotated[
        str | None, Option("-p", "--prompt", help="The text to continue; - reads standard input.")
    ] = None,
    file: Annotated[
        Path | None,
        Option(
            help="Complete every prompt of a JSON Lines file instead: strings, or objects with a "
            '"prompt".'
        ),
    ] = None,
    out: Annotated[
        Path | None, Option(help="File for the replies to --file, one JSON object a line.")
    ] = None,
    streams: Annotated[
        int | None, Option(help="Number of prompts of --file to complete at once. Default: 8.")
    ] = None,
    model: options.DefaultModelArgument = None,
    max_tokens: options.MaxTokens = 256,
    sampling: options.SamplingOptions,
    attended: options.WindowOptions,
    reply: options.ReplyOptions,
    loading: options.LoadOptions,
    stats: options.ShowStats = False,
    json: options.AsJson = False,
) -> None:
    """Continue a text of any length, without a chat template.

    With --file, replies are logged as they end, and the same command continues an interrupted run.
    The prompts share steps, which round differently: with --seed, use --streams 1 for a result that
    is the same each time.
    """
    from mlx_stream.cli.report import print_json, print_stats, stats_as_json
    from mlx_stream.generate.completion import stream, stream_steps
    from mlx_stream.generate.stats import Stats

    chosen = sampling.as_sampling()
    if (prompt is None) == (file is None) or (file is None) != (out is None):
        raise typer.BadParameter("give either -p TEXT, or --file and --out")
    if streams is not None and file is None:
        raise ValueRefused("--streams is for --file")
    if file and out:
        from mlx_stream.cli.generate_file import generate_file

        if stats or json:
            raise ValueRefused("--stats and --json do not work with --file")
        loaded = loading.load(model)
        draft = loading.load(reply.draft) if reply.draft else None

        notify_once = functools.cache(notify)  # many prompts have the same notices

        def begin(text: str) -> "Coroutine[Piece, None]":
            return stream_steps(
                loaded,
                text,
                max_tokens,
                chosen,
                reply.stop or (),
                attended.sinks,
                attended.window,
                notify=notify_once,
                kv_bits=attended.kv_bits,
                speculate=reply.speculate,
                draft=draft,
            )

        about = {"model": loaded.fingerprint(), "max_tokens": max_tokens, "stop": reply.stop}
        settings = about | vars(sampling) | vars(attended)
        streams = 8 if streams is None else streams
        check_streams(loaded, attended, streams)
        generate_file(file, out, streams, settings, begin)
        return
    assert prompt is not None
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


def check_streams(model: "Model", attended: options.WindowOptions, streams: int) -> None:
    """Refuse more streams than fit the memory together, before any is allocated."""
    from mlx_stream.cache.steps.verify import spare_rows
    from mlx_stream.models.layout import ring_bytes
    from mlx_stream.window import MOST_STREAMS

    if not model.force and 1 < streams <= MOST_STREAMS:
        sinks, window = model.resolve_window(attended.sinks, attended.window)
        bits = attended.kv_bits
        ring = ring_bytes(model.config, sinks, window, model.dtype.size, bits, spare_rows(bits))
        model.check(model.weight_bytes, streams * ring)
