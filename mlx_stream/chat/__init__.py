"""Manages conversations on one stream and saves them; independent of threads and terminals.

The public names are for programs that show saved conversations or recall evicted exchanges. Each
name is imported on first use.
"""

from typing import TYPE_CHECKING, Any

from mlx_stream.program.public_names import fetch_name

if TYPE_CHECKING:
    from mlx_stream.chat.exchange import Exchange, plural
    from mlx_stream.chat.manage import open_transcript, remove_session, rename_session
    from mlx_stream.chat.search import search_sessions
    from mlx_stream.chat.session_files import session_names
    from mlx_stream.chat.summaries import SessionSummary, session_summaries
    from mlx_stream.recall.quote import Passage, RecallStore

__all__ = [
    "Exchange",
    "Passage",
    "RecallStore",
    "SessionSummary",
    "open_transcript",
    "plural",
    "remove_session",
    "rename_session",
    "search_sessions",
    "session_names",
    "session_summaries",
]

_HOMES = {
    "Exchange": "mlx_stream.chat.exchange",
    "Passage": "mlx_stream.recall.quote",
    "RecallStore": "mlx_stream.recall.quote",
    "SessionSummary": "mlx_stream.chat.summaries",
    "open_transcript": "mlx_stream.chat.manage",
    "plural": "mlx_stream.chat.exchange",
    "remove_session": "mlx_stream.chat.manage",
    "rename_session": "mlx_stream.chat.manage",
    "search_sessions": "mlx_stream.chat.search",
    "session_names": "mlx_stream.chat.session_files",
    "session_summaries": "mlx_stream.chat.summaries",
}


def __getattr__(name: str) -> Any:
    return fetch_name(__name__, _HOMES, name)
