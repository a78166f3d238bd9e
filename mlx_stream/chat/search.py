"""Finds exchanges in saved conversations by their words; loads no model."""

from collections.abc import Callable, Iterator

from mlx_stream.chat.manage import open_transcript
from mlx_stream.chat.session_files import session_names
from mlx_stream.chat.transcript_recall import add_missing, passage
from mlx_stream.errors import SessionError
from mlx_stream.recall.find import find_hits
from mlx_stream.recall.index import WordIndex
from mlx_stream.recall.quote import Passage


def search_sessions(
    text: str, failed: Callable[[SessionError], None] = lambda error: None
) -> Iterator[tuple[str, list[Passage]]]:
    """Yield the name of each conversation and its exchanges that contain words from a text.

    Each transcript is indexed from scratch, including attended turns.

    Args:
        failed: called for each conversation that is damaged.
    """
    for name in session_names():
        try:
            with open_transcript(name) as store:
                index = WordIndex.in_memory()
                end = store.state.count + 1
                add_missing(store, index, end)
                hits = find_hits(index, text, "", 1, end, gate=False)
                yield name, [passage(hit, t) for hit in hits for t in store.turns(hit.number, 1)]
        except SessionError as error:
            failed(error)
