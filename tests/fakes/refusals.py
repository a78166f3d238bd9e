"""Command lines that must be refused, and the one line that says why."""

from pathlib import Path

from tests.fakes.shell import GREEDY, run

ASK = ("-p", "the man", *GREEDY, "--max-tokens", 4)


def one_line(*args: object, stdin: str | bytes = b"", out: str = "") -> str:
    """Run a command that must be refused, and return its one line."""
    result = run(*args, stdin=stdin)
    assert (result.code, result.out) == (1, out), result
    assert result.err.startswith("mlx_stream: ") and result.err.endswith("\n"), result.err
    assert len(result.err.splitlines()) == 1 and len(result.err) < 600
    return result.err.removeprefix("mlx_stream: ").removesuffix("\n")


def refused(model: object) -> str:
    return one_line("generate", model, *ASK)


def why(model: Path) -> str:
    """Return what is wrong with a model, from a line that names the model first."""
    line = refused(model)
    assert line.startswith(f"{model}: ")
    return line.removeprefix(f"{model}: ")
