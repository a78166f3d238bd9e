"""Saved conversations as the window needs them: their messages, and a name for a new one."""

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count

from mlx_stream.chat import SessionSummary, open_transcript, search_sessions, session_names

LONGEST_NAME = 40


@dataclass(frozen=True)
class Message:
    """A question and its reply so far.

    Attributes:
        finish: None while it is streaming.
        time: when it was asked, or written to disk, in ISO 8601.
        recalled: a line for each earlier exchange that was quoted before the question.
    """

    question: str
    reply: str = ""
    finish: str | None = None
    time: str = field(default="", compare=False)
    recalled: tuple[str, ...] = ()


def transcript(name: str) -> tuple[list[Message], str]:
    """Return a conversation's messages, and a warning if its end is damaged; reads files.

    Raises:
        SessionError: there is no such conversation, or none of it can be read.
    """
    with open_transcript(name) as store:
        turns, damage = store.whole()
    said = [(turn.exchange, turn.time) for turn in turns]
    return [Message(e.question, e.reply, e.finish, time) for e, time in said], damage


def names_with(words: str) -> set[str]:
    """Return the names of the conversations that match a search; reads files.

    Raises:
        SessionError: the folder cannot be read.
    """
    return {name for name, passages in search_sessions(words) if passages}


def new_name(question: str) -> str:
    """Return an unused name for a conversation, based on its first question; reads a folder.

    "Why is the sky blue?" becomes why-is-the-sky-blue, then why-is-the-sky-blue-2.

    Raises:
        SessionError: the folder cannot be read.
    """
    name, taken = slug(question), {one.lower() for one in session_names()}
    numbered = (f"{name}-{number}" for number in count(2))
    return next(n for n in numbered if n not in taken) if name in taken else name


def slug(question: str) -> str:
    """Return the first words of a question as a name: letters a to z and digits."""
    name = ""
    for word in re.findall(r"[a-z0-9]+", question.lower()):
        if len(name) + 1 + len(word) > LONGEST_NAME:
            break
        name = f"{name}-{word}" if name else word
    return name or "conversation"


def as_name(text: str) -> str:
    """Return the valid name that is closest to the typed text; may be empty."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-.")[:64]


def title_of(one: SessionSummary) -> str:
    """Return the title of a saved conversation: its first question, unless it was renamed."""
    title = " ".join(one.title.split())
    is_named_after = re.fullmatch(rf"{re.escape(slug(title))}(-\d+)?", one.name)
    return title if title and is_named_after else one.name


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def clock(time: str) -> str:
    """Convert an ISO 8601 time to this machine's local time, with the date unless it is today."""
    if not time:
        return ""
    local = datetime.fromisoformat(time).astimezone()
    is_today = local.date() == datetime.now().astimezone().date()
    return local.strftime("%H:%M" if is_today else "%Y-%m-%d %H:%M")
