"""Lines for a program's user: the library's parameters appear under the names of options."""

from inspect import signature
from itertools import chain

import pytest

import mlx_stream
from mlx_stream.cli import command
from mlx_stream.program.exits import OPTIONS, notify
from tests.fakes.refusals import one_line


def test_every_parameter_has_its_option_and_every_option_is_real():
    functions = (mlx_stream.ChatSession, mlx_stream.Sampling, mlx_stream.load)
    names = {*chain.from_iterable(signature(function).parameters for function in functions)}
    options = {option for one in command("chat").params for option in one.opts}
    options |= {option for one in command("chat").params for option in one.secondary_opts}
    for parameter, option in OPTIONS.items():
        assert parameter.strip("`").split("=")[0] in names
        assert {*option.split(" and ")} <= options


def test_a_line_names_options_and_leaves_everything_else(capsys):
    notify("`kv_bits` and `think`, `top_k=3`, `pip`, `mlx_stream pull window`, window")
    assert capsys.readouterr().err == (
        "mlx_stream: --kv-bits and --think and --no-think, `top_k=3`, `pip`, "
        "`mlx_stream pull window`, window\n"
    )


@pytest.mark.parametrize("option", ["--temp", "--top-p", "--window", "--max-tokens", "--kv-bits"])
def test_a_refused_option_has_its_own_name(tiny, option):
    value = {"--top-p": 2, "--kv-bits": 3, "--temp": -1}.get(option, 0)
    assert one_line("generate", tiny, "-p", "a", option, value).startswith(f"{option} must be")
