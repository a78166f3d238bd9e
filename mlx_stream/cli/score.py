"""`mlx_stream score`: how likely a text is, read as a stream."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from mlx_stream.cli import options
from mlx_stream.cli.terminal import progress_bar, read_text
from mlx_stream.program.exits import fail, notify


@options.verb
def score(
    *,
    what: Annotated[
        list[str], Argument(metavar="[MODEL] FILE", help="The text file; - reads standard input.")
    ],
    attended: options.WindowOptions,
    dense: Annotated[
        bool, Option("--dense", help="Attend to every token instead; memory then grows.")
    ] = False,
    chunk: Annotated[int, Option(help="Tokens read per step; 1 decodes token by token.")] = 128,
    max_tokens: Annotated[
        int | None, Option(help="Number of tokens to read. Default: all.")
    ] = None,
    loading: options.LoadOptions,
    json: options.AsJson = False,
) -> None:
    """Print the perplexity of a text, read without a chat template."""
    from mlx_stream.cli.report import print_json, print_text
    from mlx_stream.evaluate.report import finite
    from mlx_stream.evaluate.score import score as score_ids
    from mlx_stream.generate.token_stream import TokenStream

    if len(what) > 2:
        raise typer.BadParameter(f"expected [MODEL] FILE, got {len(what)} arguments")
    model, path = what if len(what) == 2 else (None, what[0])
    if path != "-" and Path(path).is_dir():
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
        found = score_ids(TokenStream(loaded, cache), ids, chunk, progress)
    if json:
        print_json(finite(found))
        return
    print(f"perplexity {found['perplexity']:.3f} over {found['tokens']:,} tokens")
    print_text(
        f"{found['evicted']:,} evicted; {found['tokens'] / found['seconds']:.1f} tok/s; "
        f"{found['active_bytes'] / 1e6:.1f} MB active, {found['peak_bytes'] / 1e6:.1f} MB at peak"
    )
