"""`mlx_stream ls`: list the models that can be opened without the network."""

from mlx_stream.cli import options
from mlx_stream.program.exits import notify


@options.verb
def ls(*, json: options.AsJson = False) -> None:
    """List the cached models."""
    from mlx_stream.cli.report import print_json, print_table
    from mlx_stream.hub.listing import cached_models

    models = cached_models()
    if json:
        entries = [
            {"name": m.name, "kind": m.kind, "bytes": m.bytes, "path": str(m.path)} for m in models
        ]
        print_json({"models": entries})
    elif models:
        rows = [[m.name, f"{m.bytes / 1e6:,.1f} MB", str(m.path)] for m in models]
        print_table(["model", "size", "path"], rows)
    else:
        notify("no models are cached yet; `mlx_stream chat` fetches the starter")
