"""Opens a saved conversation, from its snapshot or from its transcript.

From a snapshot, nothing is read again, and the conversation continues bit for bit as if it had
never been closed. If the snapshot is missing, damaged or from another model, the attended turns are
read again from the transcript, and a notice says so.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from mlx_stream.chat import saving
from mlx_stream.chat.exchange import plural
from mlx_stream.chat.messages import Message
from mlx_stream.chat.saving import SavedSession
from mlx_stream.chat.schema import ANSWERED, ASKED, SessionHeader
from mlx_stream.chat.session import DEFAULT_MAX_TOKENS, ChatSession
from mlx_stream.chat.session_files import SessionPaths, session_paths
from mlx_stream.chat.snapshot_metadata import SnapshotMetadata, parse_metadata
from mlx_stream.chat.store import Store
from mlx_stream.chat.transcript_recall import TranscriptRecall
from mlx_stream.errors import SnapshotError, ValueRefused
from mlx_stream.generate import snapshot
from mlx_stream.generate.model import Model
from mlx_stream.generate.prefix_cache import PrefixCache
from mlx_stream.generate.requests import Coroutine, run_coroutine
from mlx_stream.program.lock import Lock
from mlx_stream.program.notices import Notify, discard
from mlx_stream.program.paths import is_file
from mlx_stream.sampling import Sampling
from mlx_stream.text.pieces import Piece

# The fields of a header that a stream depends on, and how to name them to the user.
WORDS = {
    "fingerprint": "the model or its loading options",
    "system": "the system prompt",
    "window": "the window",
    "sinks": "`sinks`",
    "evict": "`evict`",
    "kv_bits": "`kv_bits`",
}
# The size of a snapshot without keys and values, in bytes.
BYTES_BESIDE = 2**20
BYTES_PER_ID = 32


@dataclass(frozen=True)
class SessionOptions:
    """Options for a conversation; None keeps the saved value, or the default for a new one.

    Attributes:
        recall_tokens: as in `ChatSession`; only a saved conversation can recall anything.
        began: the start time of a new conversation, which its template may mention. Default: when
            the model was loaded.
    """

    system: str | None = None
    window: int | None = None
    sinks: int | None = None
    evict: str | None = None
    sampling: Sampling | None = None
    max_tokens: int = DEFAULT_MAX_TOKENS
    stop: Sequence[str] = ()
    kv_bits: int | None = None
    speculate: bool | None = None
    draft: Model | None = None
    think: bool | None = None
    reasoning_effort: str | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    history: Sequence[Message] = ()
    prefixes: PrefixCache | None = None
    recall_tokens: int | None = 0
    began: datetime | None = None


def header_of(name: str) -> SessionHeader | None:
    """Return a session's header, or None if there is no such session.

    Raises:
        SessionError: the session is damaged, or its name is not valid.
    """
    where = session_paths(name)
    if not where.database.exists():
        return None
    with Store.open(where.database) as store:
        return store.state.header


def open_session(
    name: str,
    model: Model,
    options: SessionOptions,
    notify: Notify = discard,
    progress: Callable[[int, int], None] | None = None,
) -> SavedSession:
    """Run `open_steps` to completion."""
    return run_coroutine(open_steps(name, model, options, notify, progress))


def open_steps(
    name: str,
    model: Model,
    options: SessionOptions,
    notify: Notify = discard,
    progress: Callable[[int, int], None] | None = None,
) -> Coroutine[Piece, SavedSession]:
    """Open the conversation saved as `name`, or start a new one; a coroutine.

    Args:
        notify: called with a line that says what is read again and why.
        progress: called while turns are being reread, with the tokens read and the total.

    Raises:
        SessionError: another process has the session open, or it is damaged.
        MlxStreamError: as in `ChatSession`.
    """
    paths = session_paths(name)
    if options.speculate is None and options.draft is None:
        # Speculation depends on timing, but a saved conversation must continue bit for bit.
        options = replace(options, speculate=False)
    with ExitStack() as opened:
        recall = TranscriptRecall(paths.index, notify) if options.recall_tokens != 0 else None
        lock = opened.enter_context(Lock.acquire(paths.lock))
        snapshot.sweep_partial(paths.snapshot)
        if not paths.database.exists():
            chat = new_chat(model, options, notify, recall=recall)
            lock.close()
            return SavedSession.create(chat, name)
        if options.history:
            raise ValueRefused(f"session {name!r} already has a history: use another name")
        store = opened.enter_context(Store.open(paths.database, locked=True))
        state = store.state
        options = merge_options(options, state.header)
        chat = new_chat(model, options, notify, state.header.created, recall)
        now = replace(saving.new_header(chat), id=state.header.id, created=state.header.created)
        seeded = chat.sampler.state()
        changed = changes(state.header, now, model)
        head = yield from catch_up(chat, store, paths, changed, notify, progress)
        has_seed = options.sampling is not None and options.sampling.seed is not None
        chat.sampler.restore(seeded if has_seed else state.sampler)
        if state.header != now:
            store.update(header=now)
        saved = SavedSession(chat, name, paths, lock, store, head)
        if not head:
            chat.record_turns()
        opened.pop_all()
        return saved


def new_chat(
    model: Model,
    options: SessionOptions,
    notify: Notify,
    began: str | None = None,
    recall: TranscriptRecall | None = None,
) -> ChatSession:
    """Return a new session.

    Args:
        began: when a saved conversation started; its template may state the date. Default: as in
            the options.
        recall: finds exchanges of a saved conversation that have left the window.

    Raises:
        ValueRefused: as in `ChatSession`, or recall is requested without a saved conversation.
    """
    if options.recall_tokens and not recall:
        raise ValueRefused("recall needs a saved conversation: name it, or use --recall 0")
    template = model.tokenizer.template
    moment = datetime.fromisoformat(began).astimezone() if began else options.began
    if template and moment:
        template = template.at(moment)
    given = {**vars(options), "system": options.system or None, "evict": options.evict or "turn"}
    del given["began"]
    return ChatSession(model, notify=notify, template=template, recall=recall, **given)


def merge_options(options: SessionOptions, header: SessionHeader) -> SessionOptions:
    """Return options with the missing ones taken from a session's header."""
    names = ("system", "window", "sinks", "evict", "kv_bits")
    missing = [name for name in names if getattr(options, name) is None]
    return replace(options, **{name: getattr(header, name) for name in missing})


def changes(before: SessionHeader, now: SessionHeader, model: Model) -> str:
    """Return a description of what has changed; "" if the snapshot can still be used."""
    if model.is_fingerprint(before.fingerprint):
        before = replace(before, fingerprint=now.fingerprint)
    differ = [name for name in WORDS if getattr(before, name) != getattr(now, name)]
    if not differ:
        return ""
    return f"{' and '.join(WORDS[name] for name in differ)} changed"


def catch_up(
    chat: ChatSession,
    store: Store,
    paths: SessionPaths,
    changed: str,
    notify: Notify,
    progress: Callable[[int, int], None] | None,
) -> Coroutine[Piece, str]:
    """Bring the stream up to the end of the transcript; a coroutine.

    Args:
        changed: why the snapshot cannot be used; "" if it can.

    Returns:
        The head of the transcript if the snapshot is up to date, else "".
    """
    state, head, first, reason = store.state, "", store.state.first, changed
    if not state.count:
        return ""
    if not changed:
        try:
            about = restore(chat, store, paths)
            head, first = about.head, about.state.turns + 1
            reason = f"they are not in {paths.snapshot.name}"
        except (SnapshotError, ValueRefused) as error:
            chat.restart(chat.system, chat.stats.window)
            reason = str(error)
    turns = store.turns(min(first, state.first))
    missing = {t.number: t.exchange for t in turns if t.number >= first and t.state == ANSWERED}
    oldest = missing.get(state.first)
    if state.first >= first and not (oldest and oldest.closing_ids):
        chat.clear()  # the oldest attended turn closed no other turn, so earlier ones were cleared
        missing = {number: missing[number] for number in missing if number >= state.first}
    if missing:
        head = ""
        notify(
            f"reading {plural(len(missing))} again: {reason}; replies may differ from those of a "
            "conversation that was never closed"
        )
        yield from chat.replay_steps(missing, progress)
    chat.clear(state.first)
    chat.number, chat.recall_from = state.count, state.recall_from
    if state.first <= state.count and turns[-1].state == ASKED:
        chat.pending = turns[-1].exchange.unread
        notify("the last question was not answered because the program ended: /retry answers it")
    return head


def restore(chat: ChatSession, store: Store, paths: SessionPaths) -> SnapshotMetadata:
    """Restore the stream from the snapshot.

    Raises:
        SnapshotError, ValueRefused: there is no snapshot that matches the conversation.
    """
    path, transcript = paths.snapshot, store.state
    header_bytes = BYTES_BESIDE + BYTES_PER_ID * chat.cache.geometry.rows
    if not os.path.lexists(path):
        raise SnapshotError("there is no snapshot")
    if not is_file(path):
        raise SnapshotError(f"{path.name} is not a regular file")
    found = snapshot.load_snapshot(path, chat.cache.nbytes + header_bytes, header_bytes)
    about = parse_metadata(found)
    if not chat.model.is_fingerprint(found.model) or about.session != transcript.header.id:
        raise SnapshotError(f"{path.name} belongs to another model or conversation")
    if not about.is_of(store, found):
        raise SnapshotError(f"{path.name} contains turns that were undone later")
    exchanges = store.exchanges(about.state.first)
    if [n for n in exchanges if n <= about.state.turns] != [n for n, _ in about.state.places]:
        raise SnapshotError(f"{path.name} lacks some of the attended turns")
    chat.tokens.restore(found.state)
    chat.resume(about.state, exchanges)
    return about
