"""`mlx_stream generate`: one completion of a text."""

import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from mlx_stream.cli import options
from mlx_stream.cli.terminal import progress_bar, read_text
from mlx_stream.errors import ValueRefused
from mlx_stream.program.exits import notify

if TYPE_CHECKING:
    from mlx_stream.generate.model import Model


@options.verb
def generate(
    *,
    prompt: Annotated[
        str | None, Option("-p", "--prompt", help="The text to continue; - reads standard input.")
    ] = None,
    file: Annotated[
        Path | None,
        Option(
            help="Complete every prompt in a JSON Lines file instead: strings, or objects with a "
            '"prompt".'
        ),
    ] = None,
    out: Annotated[
        Path | None, Option(help="Output file for --file, one JSON object per line.")
    ] = None,
    streams: Annotated[
        int | None, Option(help="Number of --file prompts to complete at once. Default: 8.")
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

    With --file, replies are logged as they finish; rerun the command after an interruption.
    The prompts share steps, which affects rounding: with --seed, use --streams 1 for a
    reproducible result.
    """
    from mlx_stream.cli.report import print_json, print_stats, stats_as_json
    from mlx_stream.generate.completion import stream
    from mlx_stream.generate.stats import Stats

    chosen = sampling.as_sampling()
    if (prompt is None) == (file is None) or (file is None) != (out is None):
        raise typer.BadParameter("give either --prompt, or --file and --out")
    if streams is not None and file is None:
        raise ValueRefused("--streams needs --file")
    if file and (stats or json):
        raise ValueRefused("--stats and --json do not work with --file")
    text = read_text("-") if prompt == "-" else prompt
    loaded = loading.load(model)
    given: dict[str, Any] = {
        "max_tokens": max_tokens,
        "sampling": chosen,
        "stop": reply.stop or [],
        **vars(attended),
        "speculate": reply.speculate,
        "draft": loading.load(reply.draft) if reply.draft else None,
    }
    if file and out:
        complete_file(loaded, file, out, 8 if streams is None else streams, sampling, given)
        return
    assert text is not None
    counts = Stats()
    pieces: list[str] = []
    finish = None
    with progress_bar("reading") as progress:
        for piece in stream(loaded, text, stats=counts, notify=notify, progress=progress, **given):
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


def complete_file(
    model: "Model",
    file: Path,
    out: Path,
    streams: int,
    sampling: options.SamplingOptions,
    given: dict[str, Any],
) -> None:
    """Complete the prompts of a file, each with the arguments `given` to `stream`."""
    from mlx_stream.cli.generate_file import generate_file
    from mlx_stream.generate.completion import stream_steps

    notify_once = functools.cache(notify)  # many prompts have the same notices
    check_streams(model, given, streams)
    kept = {name: given[name] for name in ("max_tokens", "stop", "sinks", "window", "kv_bits")}
    settings = {"model": model.fingerprint(), **kept, **vars(sampling)}
    generate_file(
        file,
        out,
        streams,
        settings,
        lambda text: stream_steps(model, text, notify=notify_once, **given),
    )


def check_streams(model: "Model", given: dict[str, Any], streams: int) -> None:
    """Reject more streams than fit in memory together, before any is allocated."""
    from mlx_stream.cache.steps.verify import spare_rows
    from mlx_stream.models.layout import ring_bytes
    from mlx_stream.models.window import MOST_STREAMS

    if not model.force and 1 < streams <= MOST_STREAMS:
        sinks, window = model.resolve_window(given["sinks"], given["window"])
        bits = given["kv_bits"]
        ring = ring_bytes(model.config, sinks, window, model.dtype.size, bits, spare_rows(bits))
        model.check(model.weight_bytes, streams * ring)
