"""Rules that only tests enforce: imports go one way, READMEs are correct."""

import ast
import re
import shlex
import sys
import tomllib
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path
from types import GenericAlias
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
# Every README by its path, the benchmark log and the changelog.
READMES = {
    str(path.relative_to(ROOT)): path.read_text("utf-8")
    for folder in ("", "mlx_stream/**", "apps/**", "convert", "tests/**")
    for name in ("README.md", "BENCHMARKS.md", "CHANGELOG.md")
    for path in sorted(ROOT.glob(f"{folder}/{name}".removeprefix("/")))
}

# Each entry may import those before it and its own files. `backend` first: it loads OpenBLAS.
ROOMS = [
    "backend",
    "errors",
    "program",
    "recall",
    "rope",
    "config",
    "sampling",
    "cache",
    "models",
    "checkpoint",
    "text",
    "hub",
    "generate",
    "load",
    "plan",
    "evaluate",
    "quantize",
    "chat",
    "engine",
    "server",
    "selftest",
    "cli",
]
# Packages by the name they are imported under, where it differs from the distribution's.
DISTRIBUTIONS = {
    "huggingface_hub": "huggingface-hub",
    "mlx_lm": "mlx-lm",
    "llama_cpp": "llama-cpp-python",
    "markdown_it": "markdown-it-py",
    "prompt_toolkit": "prompt-toolkit",
}
# Extras that a verb may ask for; `dev` is for working on the project.
OPTIONAL = ("eval", "llama-cpp", "server")
MAY_IMPORT_MLX_LM = {"evaluate"}
MAY_PRINT = {"cli", "program"}
MAY_EVALUATE = {
    "generate",
    "sampling",  # evaluates its numbers, once
    "models",  # evaluates weights, once, when a model is built
    "checkpoint",
    "quantize",
    "evaluate",
    "selftest",
    "cache",  # evaluates frequencies and buffers, once, when a stream is made or restored
}


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """Yield the dotted names a file imports, anywhere in it."""
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
        assert not name.startswith("mlx_stream_"), f"{path.name} imports a program"
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


@pytest.mark.parametrize("name", ["mlx_stream", "mlx_stream.chat", "mlx_stream.hub"])
def test_public_names_are_complete(name):
    """Type checkers, lazy imports and `__all__` agree on the names."""
    room = import_module(name)
    text = Path(str(room.__file__)).read_text("utf-8")
    seen = {
        (alias.name, node.module)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("mlx_stream.")
        for alias in node.names
        if node.module != "mlx_stream.program.public_names"
    }
    modules = {"errors"} if room is mlx_stream else set()
    assert seen == set(room._HOMES.items())
    assert {*room._HOMES, *modules} == {*room.__all__}
    for public, home in room._HOMES.items():
        assert getattr(room, public) is getattr(import_module(home), public)


# Programs may use the names in `__all__` of these modules.
PUBLIC = ("mlx_stream", "mlx_stream.chat", "mlx_stream.engine", "mlx_stream.hub")
# Programs may use all names without an underscore in these modules, and in their submodules.
PUBLIC_WHOLE = ("mlx_stream.errors", "mlx_stream.program")
APPS = ROOT / "apps"
PROGRAM_FILES = sorted(p for folder in (APPS, ROOT / "convert") for p in folder.rglob("*.py"))


def is_public(module: str, name: str) -> bool:
    """Return whether programs may import a name from a module."""
    found = import_module(module)
    if name.startswith("_") or not all(part.isidentifier() for part in module.split(".")):
        return False
    if module in PUBLIC:
        return name in found.__all__ or f"{module}.{name}" in PUBLIC_WHOLE
    if module in PUBLIC_WHOLE or module.rpartition(".")[0] in PUBLIC_WHOLE:
        thing = getattr(found, name, found)  # an alias of a type has its origin's module
        return isinstance(thing, GenericAlias) or getattr(thing, "__module__", module) == module
    return False


def uses_of(tree: ast.AST, own: str) -> set[str]:
    """Return the names that a program uses but must not use.

    Args:
        own: the program's package; "" if it has none.
    """
    wrong = set()
    for node in ast.walk(tree):
        names: list[tuple[str, str]] = []
        if isinstance(node, ast.Import):
            wrong |= {a.name for a in node.names if a.name.startswith("mlx_stream.")}
            names = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(str(node.module), alias.name) for alias in node.names]
            if node.level:
                wrong.add("a relative import")
        elif isinstance(node, ast.Attribute):
            whose = ast.unparse(node.value)
            if whose == "mlx_stream" and not is_public(whose, node.attr):
                wrong.add(f"mlx_stream.{node.attr}")
            private = node.attr.startswith("_") and not node.attr.endswith("__")
            if private and whose != "self" and (whose, node.attr) != ("os", "_exit"):
                wrong.add(f"{whose}.{node.attr}")
        for module, name in names:
            top = module.split(".")[0]
            if any(part.startswith("_") and part != "__future__" for part in module.split(".")):
                wrong.add(module)
            elif name.startswith("_") or (
                top == "mlx_stream" and name and not is_public(module, name)
            ):
                wrong.add(f"{module}.{name}")
            elif top.startswith("mlx_stream_") and top != own:
                wrong.add(module)
    return wrong


@pytest.mark.parametrize("path", PROGRAM_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_programs_stand_on_public_names(path):
    own = path.parent.name if path.parent.name.startswith("mlx_stream_") else ""
    assert uses_of(ast.parse(path.read_text("utf-8")), own) == set()


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("from mlx_stream import Engine, errors", ""),
        ("from mlx_stream.errors import one_line", ""),
        ("from mlx_stream.program.lock import Lock", ""),
        ("from mlx_stream.program import sqlite", ""),
        ("from mlx_stream.chat import plural", ""),
        ("from mlx_stream_desktop.history import Message", ""),
        ("import mlx_stream; mlx_stream.load; self._mine; x.__doc__", ""),
        ("from mlx_stream import _HOMES", "mlx_stream._HOMES"),
        ("from mlx_stream import chat", "mlx_stream.chat"),
        ("from mlx_stream import cli", "mlx_stream.cli"),
        ("import mlx_stream.chat.session", "mlx_stream.chat.session"),
        ("from mlx_stream.chat import manage", "mlx_stream.chat.manage"),
        ("from mlx_stream.chat.manage import session_summaries", "mlx_stream.chat.manage."),
        ("from mlx_stream.cli.report import print_json", "mlx_stream.cli.report.print_json"),
        ("from mlx_stream.hub import resolve", "mlx_stream.hub.resolve"),
        ("from mlx_stream.program.lock import Path", "mlx_stream.program.lock.Path"),
        ("from mlx_stream_assistant.paths import private", "mlx_stream_assistant.paths"),
        ("from mlx_stream_desktop.app import _main", "mlx_stream_desktop.app._main"),
        ("import _thread", "_thread"),
        ("import mlx_stream; mlx_stream._HOMES", "mlx_stream._HOMES"),
        ("chat._settle()", "chat._settle"),
        ("from . import history", "a relative import"),
    ],
)
def test_private_names_are_found(line, wrong):
    found = sorted(uses_of(ast.parse(line), "mlx_stream_desktop"))
    assert (found[0].startswith(wrong) and len(found) == 1) if wrong else not found


def commands_of(group: Any, before: str = "") -> dict[str, Any]:
    """Return every command by the words that a user types: `chat`, `eval sinks`."""
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
    """Return the command lines of the READMEs' code blocks that run one of these programs."""
    blocks = re.findall(r"```(?:bash|console|sh)\n(.*?)```", "\n".join(READMES.values()), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return dict.fromkeys(
        line[line.index(f"{program} ") :]
        for line in lines
        for program in PROGRAMS
        if f"{program} " in line
    )


@pytest.mark.parametrize(
    "words", [f"{program} {verb}" for program, verbs in PROGRAMS.items() for verb in verbs]
)
def test_every_verb_is_in_a_readme(words):
    text = README if words.startswith("mlx_stream ") else "\n".join(READMES.values())
    assert words in text


@pytest.mark.parametrize("line", readme_commands())
def test_every_command_of_the_readmes_parses(line):
    program, *words = shlex.split(line.split("|")[0].split(">")[0])
    if words[0] == "assistant":
        program, words = "mlx_stream_assistant", words[1:]
    verbs = PROGRAMS[program]
    verb = next(verb for verb in verbs if f"{' '.join(words)} ".startswith(f"{verb} "))
    rest = words[len(verb.split()) :]
    verbs[verb].make_context(verb, rest)  # unknown options and missing arguments raise


@pytest.mark.parametrize("name", READMES)
def test_every_option_named_in_a_readme_exists(name):
    commands = [command for verbs in PROGRAMS.values() for command in verbs.values()]
    known = {
        option
        for command in (*commands, typer.main.get_command(app))
        for param in command.params
        for option in (*param.opts, *param.secondary_opts)
    }
    prose = re.sub(r"```.*?```", "", READMES[name], flags=re.DOTALL)
    spans = [s for s in re.findall(r"`([^`]+)`", prose) if s.startswith(("--", "mlx_stream"))]
    named = {option for span in spans for option in re.findall(r"(?<![\w-])--[a-z-]+", span)}
    assert named <= known | {"--help"}


def test_the_readme_is_short_and_each_one_begins_with_its_subject():
    assert len(README.splitlines()) <= 200
    for name, text in READMES.items():
        heading, empty, first = text.splitlines()[:3]
        assert heading.startswith("# ") and not empty and first, name


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("name", READMES)
def test_every_link_between_readmes_leads_somewhere(name):
    here = ROOT / name
    prose = re.sub(r"```.*?```", "", READMES[name], flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r'src(?:set)?="([^"]+)"', prose)
    for link in links:
        if link.startswith("https://"):
            continue
        place, _, anchor = link.partition("#")
        target = here.parent / place if place else here
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target.read_text("utf-8")), link


@pytest.mark.parametrize("name", [n for n in READMES if n.endswith("README.md")])
def test_a_readme_names_every_file_of_its_folder(name):
    folder = (ROOT / name).parent
    if "tests" in folder.relative_to(ROOT).parts:
        return
    files = {path.name for path in folder.glob("*.py") if not path.name.startswith("_")}
    assert {file for file in files if file not in READMES[name]} == set()


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph():
    """Return which of our modules each one imports, even if only for type hints."""
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


def test_no_file_imports_itself_by_way_of_others():
    TopologicalSorter(import_graph()).prepare()  # raises CycleError


def test_no_two_modules_have_one_name():
    stems = [path.stem for path in MODULES if "cli" not in path.relative_to(PACKAGE).parts]
    twice = {stem for stem in stems if stems.count(stem) > 1} - {"__init__"}
    assert not twice


def test_no_public_name_stands_for_two_things():
    """A verb in `cli/` may share the name of what it runs, and have helpers of its own."""
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
    tree = README[README.index("## Development") :]
    shown = (p.name for p in PACKAGE.iterdir() if not p.name.startswith(("_", ".")))
    missing = [
        name
        for name in shown
        if name not in ("README.md", "py.typed")
        and not re.search(rf"^\s+{re.escape(name)}/?\s", tree, re.MULTILINE)
    ]
    assert not missing


def test_ci_runs_the_readmes_test_command():
    command = re.search(r"^pip install -e '\.\[dev\]' && (pytest.*)$", README, re.MULTILINE)
    assert command
    assert command[1] in (ROOT / ".ci" / "run").read_text("utf-8").splitlines()


def test_no_class_has_too_many_methods():
    """Two have more than 20; their docstrings give the reason."""
    found = set()
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "apps").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef):
                methods = [
                    n for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
                ]
                if len(methods) > 20:
                    assert "It has more methods" in (ast.get_docstring(node) or ""), node.name
                    found.add(node.name)
    assert found == {"ChatSession", "StreamCache"}
