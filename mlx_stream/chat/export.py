"""Exports a conversation as Markdown or JSON, optionally to a file.

# Conversation from 2026-05-09T17:03:00Z
Model `starter`, session 3f2a...
## System            the system prompt, if there is one
## 1. You            the first question, verbatim
## 1. Model          its reply, verbatim
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_stream.chat.exchange import Exchange
from mlx_stream.chat.schema import ANSWERED, FORGOTTEN, SessionHeader, StoredTurn
from mlx_stream.errors import SessionError

HEADING = re.compile(r"^## +(System|\d+\. (You|Model))", re.MULTILINE)
# Notes on replies that were cut short.
CUT = {"length": " (hit token limit)", "interrupted": " (interrupted)"}
UNANSWERED = " (did not answer)"
DELETED = " (deleted)"  # by /forget


def export_markdown(header: SessionHeader, turns: Sequence[StoredTurn]) -> str:
    """Return a conversation as Markdown, with its texts unchanged.

    If a text contains a line like one of the headings, the real headings end with the session's id,
    which the texts cannot contain.
    """
    exchanges = [turn.exchange for turn in turns]
    texts = [header.system or "", *(text for e in exchanges for text in (e.question, e.reply))]
    mark = f" [{header.id}]" if any(HEADING.search(text) for text in texts) else ""
    model = " ".join(header.model.split())
    parts = [
        f"# Conversation from {header.created}",
        f"Model `{model}`, session {header.id}",
    ]
    if header.system is not None:
        parts += [f"## System{mark}", header.system]
    for turn in turns:
        exchange, answered = turn.exchange, turn.state == ANSWERED
        if turn.state == FORGOTTEN:
            parts.append(f"## {turn.number}. You{DELETED}{mark}")
            continue
        ended = CUT.get(exchange.finish, "") if answered else UNANSWERED
        parts += [f"## {turn.number}. You{mark}", exchange.question]
        parts += [f"## {turn.number}. Model{ended}{mark}", *[exchange.reply] * answered]
        parts += [f"`{call.name}` {json.dumps(call.arguments)}" for call in exchange.calls]
    return "\n\n".join(parts) + "\n"


def export_json(header: SessionHeader, turns: Sequence[StoredTurn]) -> dict[str, Any]:
    """Return a conversation as plain JSON values; a missing answer and deleted texts are null."""
    return {
        "session": header.id,
        "created": header.created,
        "model": header.model,
        "system": header.system,
        "turns": [
            {
                "question": turn.exchange.question if turn.state != FORGOTTEN else None,
                "reply": turn.exchange.reply if turn.state == ANSWERED else None,
                "finish": turn.exchange.finish if turn.state == ANSWERED else None,
                **exported_calls(turn.exchange),
            }
            for turn in turns
        ],
    }


def exported_calls(exchange: Exchange) -> dict[str, Any]:
    """Return the tools that a reply calls, if any."""
    calls = [{"name": call.name, "arguments": call.arguments} for call in exchange.calls]
    return {"calls": calls} if calls else {}


def write_export(path: Path, header: SessionHeader, turns: Sequence[StoredTurn]) -> None:
    """Write a conversation to a new .md or .json file that only this user may read.

    Raises:
        SessionError: the file exists, has another suffix, or cannot be written.
    """
    if path.suffix == ".json":
        text = json.dumps(export_json(header, turns), indent=2, ensure_ascii=False) + "\n"
    elif path.suffix == ".md":
        text = export_markdown(header, turns)
    else:
        raise SessionError(f"{path}: the name must end in .md or .json")
    try:
        file = os.open(path.expanduser(), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(file, "w", encoding="utf-8", errors="backslashreplace") as out:
            out.write(text)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, FileExistsError):
            reason = "it already exists: use another name"
        raise SessionError(f"{path}: cannot be written: {reason}") from error
