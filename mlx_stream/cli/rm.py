"""`mlx_stream rm`: remove a model from this machine."""

from typing import Annotated

from typer import Argument

from mlx_stream.cli import options
from mlx_stream.program.exits import fail, notify


@options.verb
def rm(
    *,
    model: Annotated[
        str,
        Argument(metavar="MODEL", help="A cached Hub id or name, a converted folder, or starter."),
    ],
    yes: options.Yes = False,
) -> None:
    """Remove a model from this machine.

    MODEL is in the Hugging Face cache, which other programs share, or is a folder that
    `mlx_stream convert` wrote.
    """
    import sys

    from mlx_stream.cli.terminal import confirm
    from mlx_stream.hub.removal import find_stored

    found = find_stored(model)
    places = " and ".join(map(str, found.folders))
    size = f"{found.bytes / 1e6:,.1f} MB"
    if not yes and not sys.stdin.isatty():
        fail(f"rm would remove {places} ({size}): add --yes")
    if not yes and not confirm(f"remove {places} ({size})"):
        notify("nothing was removed")
        return
    found.remove()
    print(f"removed {model}: {size}")
