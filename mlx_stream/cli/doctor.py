"""`mlx_stream doctor`: what this machine is, what is installed, what will be slow and why."""

from mlx_stream.cli import options
from mlx_stream.cli.terminal import guarded


@guarded
def doctor(json: options.AsJson = False) -> None:
    """Say what this machine is and what will be slow on it."""
    from mlx_stream import backend, hub
    from mlx_stream.cli.report import print_json, print_table

    facts = backend.describe()
    facts["cache"] = str(hub.cache_root())
    advice = backend.advice()
    if json:
        print_json({**facts, "advice": advice})
        return
    print_table(["what", "here"], [[name, str(value)] for name, value in facts.items()])
    print()
    for line in advice or ["nothing here will be slower than it must be"]:
        print(f"- {line}")
