"""`mlx_stream pull`: fetch a model, so that it opens without the network."""

from typing import Annotated

import typer

from mlx_stream.cli import options
from mlx_stream.cli.terminal import progress_bar
from mlx_stream.program.exits import exits_cleanly, notify

MEGABYTE = 1_000_000


@exits_cleanly
def pull(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A Hub id org/name, or starter.")],
    revision: Annotated[
        str, typer.Option("--revision", help="A branch, a tag or a commit of it.")
    ] = "main",
    json: options.AsJson = False,
) -> None:
    """Fetch a model into the shared Hugging Face cache: weights and words, never code."""
    from mlx_stream.cli.report import print_json
    from mlx_stream.hub.resolve import pull

    with progress_bar("fetching, MB") as bar:
        found = pull(
            model,
            revision,
            notify,
            lambda done, total: bar(done // MEGABYTE, total // MEGABYTE),
        )
    if json:
        print_json(
            {
                "name": found.name,
                "revision": found.revision,
                "commit": found.commit,
                "bytes": found.bytes,
                "path": str(found.path),
            }
        )
        return
    commit = f" at commit {found.commit}" if found.commit else ""
    print(f"{found.name}{commit}: {found.bytes / MEGABYTE:,.1f} MB in {found.path}")
