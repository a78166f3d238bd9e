"""`mlx_stream config`: shows where the config file is and what it contains, and changes it."""

from typing import Annotated

from typer import Argument

from mlx_stream.cli import new_group, options
from mlx_stream.cli.report import print_json
from mlx_stream.program.escape import escape
from mlx_stream.program.exits import fail, notify

app = new_group("config")

KEY = "model, window, system, temperature or prompts.NAME."


@app.command()
@options.verb
def path() -> None:
    """Print where the config file is; it need not exist."""
    from mlx_stream.cli.config_file import config_path

    print(config_path())


@app.command()
@options.verb
def get(
    *,
    key: Annotated[str | None, Argument(metavar="KEY", help=f"{KEY} Default: all.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Print a value, from the environment or else from the config file."""
    from mlx_stream.cli.config_file import KINDS, read_config, setting

    found = {**read_config(), **{name: value for name in KINDS if (value := setting(name))}}
    if key is not None:
        found = {key: setting(key)}
    if as_json:
        print_json(found)
    elif key is None:
        for name, value in found.items():
            print(f"{name} = {escape(str(value))}")
        if not found:
            notify("nothing is set: mlx_stream config set KEY VALUE sets a default")
    elif found[key] is None:
        fail(f"{key} is not set: mlx_stream config set {key} VALUE sets it")
    else:
        print(escape(str(found[key])))


@app.command("set")
@options.verb
def set_key(
    *,
    key: Annotated[str, Argument(metavar="KEY", help=KEY)],
    value: Annotated[str, Argument(metavar="VALUE", help="The default for new conversations.")],
) -> None:
    """Change a value in the config file; the rest of the file stays as it is."""
    from mlx_stream.cli.config_file import config_path, set_value

    set_value(key, value)
    notify(f"{key} is set in {config_path()}")
