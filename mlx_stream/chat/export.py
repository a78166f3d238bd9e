"""A conversation as Markdown or as JSON values, and in a file.

# Conversation of 2026-05-09T17:03:00Z
Model `starter`, session 3f2a...
## System            what the system prompt says, if there is one
## 1. You            the first question, word for word
## 1. Model          its reply, word for word
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_stream.chat.schema import ANSWERED, SessionHeader, StoredTurn
from mlx_stream.errors import SessionError

HEADING = re.compile(r"^## +(System|\d+\. (You|Model))", re.MULTILINE)
# How a reply ended, where a reader would otherwise wonder.
CUT = {"length": " (cut at its limit)", "interrupted": " (interrupted)"}
UNANSWERED = " (did not answer)"


def export_markdown(header: SessionHeader, turns: Sequence[StoredTurn]) -> str:
    """Return a conversation for people to read, its texts unchanged.

    A text may itself hold a line like our headings. Then ours end with the session's id, which
    nobody who spoke could know.
    """
    said = [turn.exchange for turn in turns]
    texts = [header.system or "", *(text for e in said for text in (e.question, e.reply))]
    mark = f" [{header.id}]" if any(HEADING.search(text) for text in texts) else ""
    model = " ".join(header.model.split())
    parts = [
        f"# Conversation of {header.created}",
        f"Model `{model}`, session {header.id}",
    ]
    if header.system is not None:
        parts += [f"## System{mark}", header.system]
    for turn in turns:
        exchange, answered = turn.exchange, turn.state == ANSWERED
        ended = CUT.get(exchange.finish, "") if answered else UNANSWERED
        parts += [f"## {turn.number}. You{mark}", exchange.question]
        parts += [f"## {turn.number}. Model{ended}{mark}", *[exchange.reply] * answered]
    return "\n\n".join(parts) + "\n"


def export_json(header: SessionHeader, turns: Sequence[StoredTurn]) -> dict[str, Any]:
    """Return a conversation as plain values for `json.dumps`; of no answer, reply is null."""
    return {
        "session": header.id,
        "created": header.created,
        "model": header.model,
        "system": header.system,
        "turns": [
            {
                "question": turn.exchange.question,
                "reply": turn.exchange.reply if turn.state == ANSWERED else None,
                "finish": turn.exchange.finish if turn.state == ANSWERED else None,
            }
            for turn in turns
        ],
    }


def write_export(path: Path, header: SessionHeader, turns: Sequence[StoredTurn]) -> None:
    """Write a conversation to a new file that only this user may read: .md or .json.

    Raises:
        SessionError: the file exists, has another suffix, or cannot be written.
    """
    if path.suffix == ".json":
        text = json.dumps(export_json(header, turns), indent=2, ensure_ascii=False) + "\n"
    elif path.suffix == ".md":
        text = export_markdown(header, turns)
    else:
        raise SessionError(f"{path}: give a file that ends in .md or .json")
    try:
        file = os.open(path.expanduser(), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(file, "w", encoding="utf-8", errors="backslashreplace") as out:
            out.write(text)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, FileExistsError):
            reason = "there is a file of that name: give another"
        raise SessionError(f"{path}: cannot be written: {reason}") from error
