"""Help texts and imports load nothing that they do not need."""

import subprocess
import sys
from typing import Any

import pytest
import typer
from typer.main import get_command

from mlx_stream.cli import VERBS, app

SERVERS = {"anyio", "h11", "starlette", "uvicorn"}  # pydantic comes with the option parser
# Packages that are slow to import, and the parts of this project that need them.
HEAVY = {
    "huggingface_hub",
    "jinja2",
    "matplotlib",
    "mlx",
    "mlx_lm",
    "numpy",
    "prompt_toolkit",
    "rich",
    "safetensors",
    "tokenizers",
    "transformers",
    *SERVERS,
}
# None of these is imported before a chat's first reply.
UNUSED = {"huggingface_hub", "matplotlib", "mlx_lm", "rich", "transformers", *SERVERS}


def loaded(program, *arguments):
    """Run Python code with arguments; return the modules that are loaded at the end."""
    code = f"""
import atexit, sys
atexit.register(lambda: print(*sys.modules, file=sys.stderr))
{program}
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        input="Hello\n",
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stderr.splitlines()[-1].split())


def tops(modules):
    return {name.split(".")[0] for name in modules}


def test_importing_the_package_loads_the_errors_and_openblas_only():
    modules = loaded("import mlx_stream")
    ours = {name for name in modules if name.startswith("mlx_stream")}
    assert ours == {"mlx_stream", "mlx_stream.backend", "mlx_stream.errors"}
    assert not tops(modules) & (HEAVY | {"typer", "importlib.metadata"})


def test_a_public_name_is_fetched_when_it_is_asked_for():
    program = "import mlx_stream\nmlx_stream.{}"
    assert "mlx_stream.chat.session" not in loaded(program.format("load"))
    assert "mlx_stream.chat.session" in loaded(program.format("ChatSession"))


@pytest.mark.parametrize(
    "first", ["mlx_stream.load", "mlx_stream.generate.completion", "mlx_stream.chat.session"]
)
def test_a_function_is_not_hidden_by_the_module_of_its_name(first):
    program = f"import {first}\nimport mlx_stream\nassert callable(mlx_stream.load)\n"
    program += "from mlx_stream import load, stream\nassert callable(load) and callable(stream)"
    loaded(program)


def test_a_name_that_is_none_is_said_to_be_none():
    loaded(
        "import mlx_stream\n"
        "try: mlx_stream.chats\n"
        "except AttributeError as error: assert 'chats' in str(error)\n"
        "else: raise SystemExit(1)"
    )


@pytest.mark.parametrize("option", ["--help", "-h", "--version"])
def test_help_loads_no_verb(option):
    modules = loaded("from mlx_stream.cli import main\nmain()", option)
    ours = {name for name in modules if name.startswith("mlx_stream.")}
    assert ours == {
        "mlx_stream.backend",
        "mlx_stream.errors",
        "mlx_stream.cli",
        "mlx_stream.program",
        "mlx_stream.program.exits",
        "mlx_stream.program.help",
    }
    assert not tops(modules) & HEAVY


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_loads_no_other_and_no_model(verb):
    modules = loaded("from mlx_stream.cli import main\nmain()", verb, "--help")
    verbs = {name.split(".")[2] for name in modules if name.startswith("mlx_stream.cli.")}
    assert verbs & set(VERBS) == {verb}
    assert not tops(modules) & HEAVY


def test_a_chat_loads_nothing_it_does_not_need(letters):
    options = ("chat", letters, "--temp", 0, "--max-tokens", 4)
    modules = loaded("from mlx_stream.cli import main\nmain()", *options)
    assert "mlx_stream.chat.session" in modules
    assert not tops(modules) & UNUSED


def test_help_says_of_each_verb_the_first_sentence_of_its_own():
    group: Any = get_command(app)
    context = typer.Context(group)
    for verb, sentence in VERBS.items():
        own = " ".join((group.get_command(context, verb).help or "").split("\n\n")[0].split())
        assert own.startswith(sentence.removesuffix(".")), verb
