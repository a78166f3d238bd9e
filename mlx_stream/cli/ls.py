"""`mlx_stream ls`: the models that can be opened offline, with sizes and dates."""

from datetime import datetime

from mlx_stream.cli import options
from mlx_stream.program.exits import notify


@options.verb
def ls(*, json: options.AsJson = False) -> None:
    """List the models on this machine: cached, or written by convert."""
    from dataclasses import asdict

    from mlx_stream.cli.report import print_json, print_table
    from mlx_stream.hub.listing import cached_models

    models = cached_models()
    if json:
        print_json({"models": [{**asdict(model), "path": str(model.path)} for model in models]})
    elif models:
        rows = [
            [m.name, f"{m.bytes / 1e6:,.1f} MB", f"{datetime.fromtimestamp(m.date):%Y-%m-%d}"]
            for m in models
        ]
        print_table(["model", "on disk", "date"], rows)
    else:
        notify("no models are cached yet; `mlx_stream models` lists some")
