"""Slash commands: which line is one, what each asks of a conversation, and what it answers."""

from pathlib import Path

import pytest

from mlx_stream.chat.exchange import Exchange
from mlx_stream.cli.commands import COMMANDS, Call, completions, parse, run, status
from mlx_stream.errors import MlxStreamError, SnapshotError, ValueRefused
from mlx_stream.generate.stats import Stats
from mlx_stream.text.pieces import Piece

STATS = Stats(
    attended=1012,
    evicted=3400,
    sinks=4,
    window=2048,
    cache_bytes=94_600_000,
    decoded_tokens=123,
    reply_seconds=10.0,
)


class Recorder:
    """A conversation that keeps what was asked of it, and refuses what `error` says."""

    name = "letters"

    def __init__(self, error: MlxStreamError | None = None, system: str | None = "Be brief."):
        self.asked: list[tuple[object, ...]] = []
        self.error, self.system, self.stats = error, system, STATS
        self.last: Exchange | None = Exchange("Who\nwrote it?", "Nobody.", (), (), ())

    def ask(self, *what: object) -> None:
        if self.error:
            raise self.error
        self.asked.append(what)

    def pieces(self):
        yield Piece("a reply", "end")

    def retry(self, *, progress=None):
        self.ask("retry", progress)
        return self.pieces()

    def edit(self, question: str, *, progress=None):
        self.ask("edit", question, progress)
        return self.pieces()

    def undo(self) -> Exchange:
        self.ask("undo")
        assert self.last
        return self.last

    def clear(self) -> None:
        self.ask("clear")

    def set_system(self, text: str | None) -> None:
        self.ask("set_system", text)

    def resize(self, window: int) -> None:
        self.ask("resize", window)
        self.stats = Stats(sinks=4, window=window)

    def save(self, name: str | None) -> str:
        self.ask("save", name)
        return f"saved as {name or self.name}"

    def export(self, path: Path) -> str:
        self.ask("export", path)
        return f"written to {path}"


def progress(done: int, total: int) -> None:
    """Stand for a progress callback."""


def say(line, conversation=None, sessions=()):
    call = parse(line)
    assert isinstance(call, Call)
    return run(call, conversation or Recorder(), lambda: sessions, progress)


@pytest.mark.parametrize(
    ("line", "parsed"),
    [
        ("Hello", "Hello"),
        ("  /help", "  /help"),
        ("first\n/help", "first\n/help"),
        ("//etc/hosts says", "/etc/hosts says"),
        ("//", "/"),
        ("/help", Call("/help")),
        ("/help  ", Call("/help")),
        ("/system Be  brief.\nAnd kind. ", Call("/system", "Be  brief.\nAnd kind.")),
        ("/system\nBe brief.", Call("/system", "Be brief.")),
        ("/window 512", Call("/window", "512")),
        ("/", Call("/")),
        ("/ help", Call("/", "help")),
        ("/usr/bin is what?", Call("/usr/bin", "is what?")),
    ],
)
def test_a_line_is_a_command_or_a_question(line, parsed):
    assert parse(line) == parsed


@pytest.mark.parametrize("line", ["/", "/ help", "/exit", "/usr/bin is what?", "/HELP", "/re"])
def test_an_unknown_command_is_answered_by_one_line_and_asks_nothing(line):
    conversation = Recorder()
    outcome = say(line, conversation)
    assert f"{line.split()[0]} is no command" in outcome.text
    assert "/help" in outcome.text and "\n" not in outcome.text
    assert (outcome.pieces, outcome.prefill, outcome.quit) == (None, "", False)
    assert conversation.asked == []


@pytest.mark.parametrize(
    ("line", "asked"),
    [
        ("/retry", ("retry", progress)),
        ("/edit Who read it?\nWhen?", ("edit", "Who read it?\nWhen?", progress)),
        ("/edit /etc?", ("edit", "/etc?", progress)),
        ("/undo", ("undo",)),
        ("/clear", ("clear",)),
        ("/system Be kind.", ("set_system", "Be kind.")),
        ("/system ''", ("set_system", None)),
        ("/window 512", ("resize", 512)),
        ("/window 2,048", ("resize", 2048)),
        ("/save", ("save", None)),
        ("/save my letters", ("save", "my letters")),
        ("/export talk.md", ("export", Path("talk.md"))),
        ("/export 'my talk.json'", ("export", Path("my talk.json"))),
        ("/export ~/talk.md", ("export", Path.home() / "talk.md")),
    ],
)
def test_a_command_asks_one_thing_of_the_conversation(line, asked):
    conversation = Recorder()
    say(line, conversation)
    assert conversation.asked == [asked]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("/undo", "taken back: Who wrote it?"),
        ("/system", "Be brief."),
        ("/system Be kind.", "the system prompt is changed"),
        ("/system ''", "there is no system prompt now"),
        ("/stats", str(STATS)),
        ("/window", "the window is 2,048 tokens, after 4 that always stay"),
        ("/window 1,512", "the window is 1,512 tokens, after 4 that always stay"),
        ("/save", "saved as letters"),
        ("/export talk.md", "written to talk.md"),
        ("/sessions", "one\ntwo"),
    ],
)
def test_a_command_answers(line, text):
    outcome = say(line, sessions=["one", "two"])
    assert (outcome.text, outcome.pieces, outcome.prefill, outcome.quit) == (text, None, "", False)


def test_what_is_not_there_is_said():
    conversation = Recorder(system=None)
    conversation.last = None
    assert say("/system", conversation).text == "there is no system prompt"
    assert (
        say("/edit", conversation).text
        == "nothing was said yet: there is nothing that could be edited"
    )
    assert say("/sessions").text.startswith("no session is saved")


@pytest.mark.parametrize("line", ["/retry", "/edit Who?"])
def test_a_reply_comes_in_pieces(line):
    outcome = say(line)
    assert outcome.pieces and [piece.text for piece in outcome.pieces] == ["a reply"]


def test_edit_alone_begins_the_next_line_with_what_replaces_the_question():
    conversation = Recorder()
    outcome = say("/edit", conversation)
    assert outcome.prefill == "/edit Who\nwrote it?"
    assert parse(outcome.prefill) == Call("/edit", "Who\nwrote it?")
    assert conversation.asked == []


def test_quit_quits():
    assert say("/quit").quit


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("/undo 3", "/undo takes nothing after it, not '3'"),
        ("/quit now", "/quit takes nothing after it, not 'now'"),
        ("/window wide", "/window takes a whole number of tokens, not 'wide'"),
        ("/window 1.5", "/window takes a whole number of tokens, not '1.5'"),
        ("/window " + "9" * 5000, "/window takes a whole number of tokens, not '9999"),
        ("/export", "/export needs something after it: /export FILE"),
        ("/export ~nobody-of-this-name/a.md", "/export ~nobody-of-this-name/a.md: "),
    ],
)
def test_a_wrong_argument_is_refused_in_one_line_and_asks_nothing(line, text):
    conversation = Recorder()
    outcome = say(line, conversation)
    assert outcome.text.startswith(text)
    assert len(outcome.text) < 200 and "\n" not in outcome.text
    assert not outcome.quit and conversation.asked == []


@pytest.mark.parametrize(
    "line",
    ["/retry", "/edit a", "/undo", "/clear", "/system a", "/window 1", "/save", "/export a.md"],
)
@pytest.mark.parametrize("error", [ValueRefused("not\nnow"), SnapshotError("not now")])
def test_what_the_conversation_refuses_is_one_line(line, error):
    outcome = say(line, Recorder(error))
    assert (outcome.text, outcome.pieces, outcome.quit) == ("not now", None, False)


def test_what_is_answered_is_harmless():
    assert say("/sessions", sessions=["a\x1b[2J"]).text == "a\\x1b[2J"
    assert say("/system", Recorder(system="a\x1b[2J")).text == "a\\x1b[2J"
    assert say("/undo", Recorder(ValueRefused("\x1b[2J"))).text == "\\x1b[2J"
    assert "\x1b" not in say("/\x1b[2J").text


def test_help_lists_every_command_as_the_prompt_completes_it():
    lines = say("/help").text.splitlines()
    assert [line.split()[0] for line in lines] == [*COMMANDS, "//TEXT"]
    assert all(help in line for help, line in zip(completions().values(), lines, strict=False))
    assert list(completions()) == list(COMMANDS)
    assert max(map(len, lines)) < 80


def test_the_commands_are_those_that_were_promised():
    promised = "help system retry undo edit stats window save sessions export clear quit"
    assert [name.removeprefix("/") for name in COMMANDS] == promised.split()


def test_the_status_bar_tells_attention_speed_and_memory():
    text = "1,012/2,052 attended · 3,400 evicted · 12.3 tok/s · cache 94.6 MB"
    assert status(STATS) == text
    assert status(STATS, "letters") == f"{text} · letters"
