"""How tests run the command line, in this process or as a program, and edit a model's JSON."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from typer.testing import CliRunner

from mlx_stream.cli import app

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
GREEDY = ("--temp", "0")
DEADLINE = 60.0


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes a key."""
    value = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


def run(*args: object, stdin: str | bytes = b"") -> SimpleNamespace:
    """Run the command line in this process; an exception other than an exit is a failure."""
    result = CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return SimpleNamespace(code=result.exit_code, out=result.stdout, err=result.stderr)


def done(*args: object, stdin: str | bytes = b"") -> SimpleNamespace:
    result = run(*args, stdin=stdin)
    assert result.code == 0, result.err
    return result


def parsed(text: str) -> dict[str, Any]:
    """Read exactly one JSON object on one line: strictly, so no NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    assert text.endswith("}\n") and text.count("\n") == 1
    return json.loads(text, parse_constant=refuse)


def program(*args: object) -> list[str]:
    return [sys.executable, "-m", "mlx_stream", *(str(arg) for arg in args)]
