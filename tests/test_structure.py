"""What nothing keeps unless a test does: imports one way, a README that is true."""

import ast
import re
import shlex
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer.main

import mlx_stream
from mlx_stream.cli import app
from mlx_stream_assistant.cli import app as assistant

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mlx_stream"
MODULES = sorted(PACKAGE.rglob("*.py"))
README = (ROOT / "README.md").read_text("utf-8")

# Each room may import those before it, and files of its own. `backend` first: it loads OpenBLAS.
ROOMS = [
    "backend",
    "errors",
    "program",
    "config",
    "sampling",
    "window",
    "cache",
    "checkpoint",
    "models",
    "text",
    "hub",
    "load",
    "plan",
    "generate",
    "evaluate",
    "quantize",
    "chat",
    "engine",
    "selftest",
    "cli",
]
# Packages by the name they are imported under, where it is not the distribution's.
DISTRIBUTIONS = {
    "huggingface_hub": "huggingface-hub",
    "mlx_lm": "mlx-lm",
    "llama_cpp": "llama-cpp-python",
    "prompt_toolkit": "prompt-toolkit",
}
# Extras that a verb may ask for; `dev` is for working on the project.
OPTIONAL = ("eval", "llama-cpp")
MAY_IMPORT_MLX_LM = {"evaluate"}
MAY_PRINT = {"cli", "program"}
MAY_EVALUATE = {
    "generate",
    "sampling",  # its numbers, once
    "models",  # weights, once, when a model is built
    "checkpoint",
    "quantize",
    "evaluate",
    "selftest",
    "cache",  # frequencies and buffers, once, when a stream is made or restored
}


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """Yield the dotted names a file imports, wherever in it they stand."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import"
            yield node.module
            if node.module == "mlx_stream":
                yield from (f"mlx_stream.{alias.name}" for alias in node.names)


def calls(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_says_what_it_knows_and_imports_one_way(path):
    text = path.read_text("utf-8")
    assert (ast.get_docstring(ast.parse(text)) or "").strip()
    if room(path) in ("__init__", "__main__"):
        return
    rank = ROOMS.index(room(path))
    for name in imports(path):
        if name.startswith("mlx_stream."):
            assert ROOMS.index(name.split(".")[1]) <= rank, f"{path.name} imports {name}"
        if name.split(".")[0] in ("mlx_lm", "transformers"):
            assert name.startswith("mlx_lm") and room(path) in MAY_IMPORT_MLX_LM
    if room(path) not in MAY_PRINT:
        assert "print" not in calls(path)
    if room(path) not in MAY_EVALUATE:
        assert not any(name in ("mx.eval", "mx.async_eval") for name in calls(path))


def test_every_imported_package_is_declared_and_every_declared_one_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = list(project["dependencies"])
    for extra in OPTIONAL:
        lines += project["optional-dependencies"][extra]
    declared = {re.split(r"[\[>=; ]", line)[0] for line in lines}
    found = {name.split(".")[0] for path in MODULES for name in imports(path)}
    found -= {"mlx_stream", *sys.stdlib_module_names}
    assert {DISTRIBUTIONS.get(name, name) for name in found} == declared


def test_public_names_are_complete():
    """What type checkers see, what is fetched when asked for, and what is declared are one."""
    seen = {
        (alias.name, node.module)
        for node in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text("utf-8")))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("mlx_stream.")
        for alias in node.names
    }
    assert seen == set(mlx_stream._HOMES.items())
    assert sorted({*mlx_stream._HOMES, "errors"}) == dir(mlx_stream) == mlx_stream.__all__
    for name, home in mlx_stream._HOMES.items():
        assert getattr(mlx_stream, name) is getattr(import_module(home), name)


def commands_of(group: Any, before: str = "") -> dict[str, Any]:
    """Return every command by what one types for it: `chat`, `eval sinks`."""
    found = {}
    for name in group.list_commands(None):
        command = group.get_command(None, name)
        if hasattr(command, "commands"):
            found |= commands_of(command, f"{before}{name} ")
        else:
            found[before + name] = command
    return found


COMMANDS = commands_of(typer.main.get_command(app))
PROGRAMS = {
    "mlx_stream": COMMANDS,
    "mlx_stream_assistant": commands_of(typer.main.get_command(assistant)),
}


def readme_commands():
    """Return the command lines of the README's code blocks that run one of these programs."""
    blocks = re.findall(r"```(?:bash|console|sh)\n(.*?)```", README, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [
        line[line.index(f"{program} ") :]
        for line in lines
        for program in PROGRAMS
        if f"{program} " in line
    ]


@pytest.mark.parametrize(
    "words", [f"{program} {verb}" for program, verbs in PROGRAMS.items() for verb in verbs]
)
def test_every_verb_is_in_the_readme(words):
    assert words in README


@pytest.mark.parametrize("line", readme_commands())
def test_every_command_of_the_readme_parses(line):
    program, *words = shlex.split(line.split("|")[0].split(">")[0])
    verbs = PROGRAMS[program]
    verb = next(verb for verb in verbs if f"{' '.join(words)} ".startswith(f"{verb} "))
    rest = words[len(verb.split()) :]
    verbs[verb].make_context(verb, rest)  # unknown options and missing arguments raise


def test_every_option_named_in_the_readme_exists():
    known = {
        option
        for verbs in PROGRAMS.values()
        for command in verbs.values()
        for param in command.params
        for option in (*param.opts, *param.secondary_opts)
    }
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    assert set(re.findall(r"`(--[a-z-]+)", prose)) <= known | {"--help"}


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph():
    """Return which of our modules each one imports, for types too."""
    names = {module_of(path) for path in MODULES}
    graph = {}
    for path in MODULES:
        found = set()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    found.add(whole if whole in names else str(node.module))
        graph[module_of(path)] = (found & names) - {module_of(path)}
    return graph


def reachable(graph, start):
    seen, waiting = set(), list(graph[start])
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += graph[name]
    return seen


# Steps know the cache whose step they are, until it plans them without changing anything.
ALLOWED_CIRCLE = {"mlx_stream.cache.stream"} | {
    f"mlx_stream.cache.steps.{name}" for name in ("decode", "prefill", "quantized", "verify")
}


def test_no_file_imports_itself_by_way_of_others():
    graph = import_graph()
    circles = {name for name in graph if name in reachable(graph, name)}
    assert circles <= ALLOWED_CIRCLE


def test_no_two_modules_have_one_name():
    stems = [path.stem for path in MODULES if "cli" not in path.relative_to(PACKAGE).parts]
    twice = {stem for stem in stems if stems.count(stem) > 1} - {"__init__"}
    assert not twice


def test_no_public_name_stands_for_two_things():
    """A verb in `cli/` may have the name of what it runs, and helpers of its own."""
    places: dict[str, list[Path]] = {}
    for path in MODULES:
        if "cli" in path.relative_to(PACKAGE).parts:
            continue
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                places.setdefault(node.name, []).append(path)
    twice = {name for name, found in places.items() if len(found) > 1}
    assert {name for name in twice if not name.startswith("_")} == set()


def test_tests_stand_as_the_package_does():
    rooms = {room(path) for path in MODULES} - {"__init__", "__main__"}
    served = {"fakes", "fuzz", "long", "measure", "apps", "assistant", "desktop"}
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()}
    assert folders - {"__pycache__"} <= rooms | served


def test_the_readme_shows_every_room():
    tree = README[README.index("## Where things are") :]
    missing = [
        name
        for name in (p.name for p in PACKAGE.iterdir() if not p.name.startswith(("_", ".")))
        if not re.search(rf"^\s+{re.escape(name)}/?\s", tree, re.MULTILINE)
    ]
    assert not missing


def test_ci_runs_the_readmes_test_command():
    command = re.search(r"^pip install -e '\.\[dev\]' && (pytest.*)$", README, re.MULTILINE)
    assert command
    assert command[1] in (ROOT / ".ci" / "run").read_text("utf-8").splitlines()
