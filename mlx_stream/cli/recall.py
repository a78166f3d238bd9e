"""Chat commands for text that has left the window; independent of terminals."""

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from mlx_stream.errors import ValueRefused

if TYPE_CHECKING:
    from mlx_stream.chat.saving import SavedSession
    from mlx_stream.chat.session import ChatSession
    from mlx_stream.recall.quote import Passage


def show_recalled(chat: "ChatSession", text: str) -> str:
    """Return what was quoted before the last question, or the exchanges found by a search."""
    saved = saved_or_refuse(chat)
    if not text:
        found: Sequence[Passage] = chat.recalled
        nothing = "nothing was quoted before the last question"
        if not chat.recall:
            nothing = "recall is off: --recall B turns it on"
    elif saved.recall is None:
        raise ValueRefused("recall is off: --recall B turns it on; `sessions search` also works")
    else:
        end = chat.conversation_state().first
        found = saved.recall.find(text, "", 1, end, gate=False)
        nothing = "no exchange that has left the window contains any of these words"
    return "\n".join(describe_passages(found)) or nothing


def describe_passages(passages: Iterable["Passage"]) -> Iterable[str]:
    """Yield lines about passages: each one's number and date, why it was found, and its text."""
    for passage in passages:
        why = f"{passage.share:.0%} of the question: {', '.join(passage.words)}"
        yield f"{passage.number:,} · {why}\n  {passage.line}"


def forget(chat: "ChatSession", argument: str) -> str:
    """Remove from every file the texts of an exchange that has left the window."""
    saved = saved_or_refuse(chat)
    try:
        number = int(argument.replace(",", ""))
    except ValueError:
        raise ValueRefused(f"/forget takes a number, not {argument!r:.60}") from None
    exchange = saved.forget(number)
    saved.write_snapshot()
    forget_typed([exchange.question])
    return f"exchange {number:,} is deleted"


def pin(chat: "ChatSession", text: str) -> str:
    """Add a line to the system prompt."""
    chat.restart("\n".join(filter(None, (chat.system, text))), chat.stats.window)
    return f"pinned: the system prompt now has {chat.stats.pinned:,} tokens"


def clear(chat: "ChatSession") -> str:
    """Evict every turn, and remove its traces from the snapshot and the prompt's history."""
    from mlx_stream.chat.saving import saved_as, saved_turns

    questions = [turn.exchange.question for turn in saved_turns(chat)[1]]
    chat.clear()
    forget_typed(questions)
    if saved := saved_as(chat):
        saved.write_snapshot()
    return "only the system prompt is attended to now"


def forget_typed(questions: Collection[str]) -> None:
    """Remove questions from the history file, which holds the lines typed at any prompt."""
    from mlx_stream.cli.history import HISTORY, remove_lines
    from mlx_stream.program.paths import data_folder

    remove_lines(data_folder().parent / HISTORY, questions)


def saved_or_refuse(chat: "ChatSession") -> "SavedSession":
    from mlx_stream.chat.saving import saved_as

    if saved := saved_as(chat):
        return saved
    raise ValueRefused("only a saved conversation can recall or forget: name it with /save NAME")
