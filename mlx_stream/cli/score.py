"""`mlx_stream score`: how likely a text is, read as a stream."""

from pathlib import Path
from typing import Annotated

import typer

from mlx_stream.cli import options
from mlx_stream.cli.terminal import progress_bar, read_text
from mlx_stream.program.exits import exits_cleanly, fail, notify


@exits_cleanly
@options.grouped
def score(
    *,
    what: Annotated[
        list[str],
        typer.Argument(metavar="[MODEL] FILE", help="The text file; - reads standard input."),
    ],
    attended: options.WindowOptions,
    dense: Annotated[
        bool, typer.Option("--dense", help="Attend to everything instead, in growing memory.")
    ] = False,
    chunk: Annotated[
        int, typer.Option("--chunk", help="Tokens read per step; 1 decodes token by token.")
    ] = 128,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="Read only so many tokens of the text.")
    ] = None,
    loading: options.LoadOptions,
    json: options.AsJson = False,
) -> None:
    """Print the perplexity of a text, read as is: no chat template."""
    from mlx_stream.cli.report import print_json
    from mlx_stream.evaluate.score import score as score_ids
    from mlx_stream.generate.token_stream import TokenStream

    if len(what) > 2:
        raise typer.BadParameter(f"expected [MODEL] FILE, got {len(what)} arguments")
    *models, path = what
    model = models[0] if models else "starter"
    if not models and path != "-" and not Path(path).exists():
        fail(f"{path}: no such file: give the text to score, after the model if one is named")
    if Path(path).is_dir():
        fail(f"{path}: is a folder: after the model, give the text file to score")
    if max_tokens is not None and max_tokens < 2:
        fail(f"--max-tokens must be at least 2, not {max_tokens}")
    if dense and attended != options.WindowOptions():
        fail("--dense attends to everything: leave out --window, --sinks and --kv-bits")
    text = read_text(path)
    loaded = loading.load(model)
    ids = loaded.tokenizer.encode(text)[:max_tokens]
    if dense:
        cache = loaded.new_dense_cache()
    else:
        cache = loaded.new_cache(
            attended.sinks, attended.window, notify=notify, kv_bits=attended.kv_bits
        )
    with progress_bar("scoring") as progress:
        result = score_ids(TokenStream(loaded, cache), ids, chunk, progress)
    if json:
        print_json(result.as_json())
        return
    print(f"perplexity {result.perplexity:.3f} over {result.tokens:,} tokens")
    print(
        f"{result.evicted:,} evicted; {result.tokens / result.seconds:.1f} tok/s; "
        f"{result.active_bytes / 1e6:.1f} MB active, {result.peak_bytes / 1e6:.1f} MB at peak"
    )
