"""A conversation as Markdown or as JSON values; knows no files.

# Conversation of 2026-05-09T17:03:00Z
Model `starter`, session 3f2a...
## System            what the system prompt says, if there is one
## 1. You            the first question, word for word
## 1. Model          its reply, word for word
"""

import re
from collections.abc import Sequence
from typing import Any

from mlx_stream.chat.exchange import Exchange
from mlx_stream.chat.store import SessionHeader

HEADING = re.compile(r"^## +(System|\d+\. (You|Model))", re.MULTILINE)
# How a reply ended, where a reader would otherwise wonder.
CUT = {"length": " (cut at its limit)", "interrupted": " (interrupted)"}


def export_markdown(header: SessionHeader, exchanges: Sequence[Exchange]) -> str:
    """Return a conversation for people to read, its texts unchanged.

    A text may itself hold a line like our headings. Then ours end with the session's id, which
    nobody who spoke could know.
    """
    texts = [header.system or "", *(text for e in exchanges for text in (e.question, e.reply))]
    mark = f" [{header.id}]" if any(HEADING.search(text) for text in texts) else ""
    model = " ".join(header.model.split())
    parts = [
        f"# Conversation of {header.created}",
        f"Model `{model}`, session {header.id}",
    ]
    if header.system is not None:
        parts += [f"## System{mark}", header.system]
    for number, exchange in enumerate(exchanges, 1):
        parts += [f"## {number}. You{mark}", exchange.question]
        parts += [f"## {number}. Model{CUT.get(exchange.finish, '')}{mark}", exchange.reply]
    return "\n\n".join(parts) + "\n"


def export_json(header: SessionHeader, exchanges: Sequence[Exchange]) -> dict[str, Any]:
    """Return a conversation as plain values for `json.dumps`."""
    return {
        "session": header.id,
        "created": header.created,
        "model": header.model,
        "system": header.system,
        "turns": [
            {"question": e.question, "reply": e.reply, "finish": e.finish} for e in exchanges
        ],
    }
