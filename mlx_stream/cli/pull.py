"""`mlx_stream pull`: fetches a model, so that it can be opened without network access."""

from typing import Annotated

from typer import Argument, Option

from mlx_stream.cli import options
from mlx_stream.cli.terminal import progress_bar
from mlx_stream.program.exits import notify

MEGABYTE = 1_000_000


@options.verb
def pull(
    *,
    model: Annotated[str, Argument(metavar="MODEL", help="A Hub id (org/name), or starter.")],
    revision: Annotated[str, Option(help="Branch, tag or commit to fetch.")] = "main",
    json: options.AsJson = False,
) -> None:
    """Fetch a model into the shared Hugging Face cache: weights and tokenizer, never code."""
    from dataclasses import asdict

    from mlx_stream.cli.report import print_json, print_text
    from mlx_stream.hub.resolve import pull

    with progress_bar("fetching, MB") as bar:
        found = pull(
            model, revision, notify, lambda done, all: bar(done // MEGABYTE, all // MEGABYTE)
        )
    if json:
        print_json({**asdict(found), "path": str(found.path)})
        return
    commit = f" at commit {found.commit}" if found.commit else ""
    print_text(f"{found.name}{commit}: {found.bytes / MEGABYTE:,.1f} MB on disk, in {found.path}")
