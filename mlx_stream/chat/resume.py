"""A saved conversation -> one that goes on: from its snapshot, or from what was said.

From a snapshot nothing is read again, and what follows is bit for bit what would have followed. A
snapshot that is missing, damaged or another model's is not used: then what was attended is read
again from the transcript, and that is said.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from mlx_stream.chat import saving
from mlx_stream.chat.exchange import Exchange, plural
from mlx_stream.chat.saving import SavedSession
from mlx_stream.chat.schema import ANSWERED, ASKED, SessionHeader
from mlx_stream.chat.session import DEFAULT_MAX_TOKENS, ChatSession
from mlx_stream.chat.session_files import SessionPaths, session_paths
from mlx_stream.chat.snapshot_metadata import SnapshotMetadata, parse_metadata
from mlx_stream.chat.store import Store
from mlx_stream.errors import SnapshotError, ValueRefused
from mlx_stream.generate import snapshot
from mlx_stream.generate.requests import Coroutine, run_coroutine
from mlx_stream.load import Model
from mlx_stream.program.lock import Lock
from mlx_stream.program.notices import Notify, discard
from mlx_stream.program.paths import is_file
from mlx_stream.sampling import Sampling
from mlx_stream.text.pieces import Piece

# What a stream depends on, of a header, as its user knows it.
WORDS = {
    "fingerprint": "the model, or how it is loaded,",
    "system": "the system prompt",
    "window": "the window",
    "sinks": "--sinks",
    "evict": "--evict",
    "kv_bits": "--kv-bits",
}
# Beside the keys and values: numbers, ids and what was unread, in JSON and checksummed.
BYTES_BESIDE = 2**20
BYTES_PER_ID = 32


@dataclass(frozen=True)
class SessionOptions:
    """How a conversation is held; None is what it was, or the default for a new one."""

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


def header_of(name: str) -> SessionHeader | None:
    """Return what a session is, without opening it for writing; None if there is none.

    Raises:
        SessionError: it is damaged, or it cannot be a name.
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
    """Do all of `open_steps` at once."""
    return run_coroutine(open_steps(name, model, options, notify, progress))


def open_steps(
    name: str,
    model: Model,
    options: SessionOptions,
    notify: Notify = discard,
    progress: Callable[[int, int], None] | None = None,
) -> Coroutine[Piece, SavedSession]:
    """Go on with the conversation saved as `name`, or begin it; a coroutine.

    Args:
        notify: told in one line what is read again, and why.
        progress: called while that happens, with the tokens read and those to read.

    Raises:
        SessionError: another process has it open, or it is damaged.
        MlxStreamError: as `ChatSession`.
    """
    paths = session_paths(name)
    lock = Lock.acquire(paths.lock)
    store = None
    if options.speculate is None and options.draft is None:
        # What is saved goes on to the bit, which guesses, timed as they are, would not.
        options = replace(options, speculate=False)
    try:
        snapshot.sweep_partial(paths.snapshot)
        if not paths.database.exists():
            chat = new_chat(model, options, notify)
            lock.close()
            return SavedSession.create(chat, name)
        store = Store.open(paths.database)
        state = store.state
        chat = new_chat(model, merge_options(options, state.header), notify, state.header.created)
        now = replace(saving.new_header(chat), id=state.header.id, created=state.header.created)
        seeded = chat.sampler.state()
        changed = changes(state.header, now, model)
        head = yield from catch_up(chat, store, paths, changed, notify, progress)
        asked = options.sampling is not None and options.sampling.seed is not None
        chat.sampler.restore(seeded if asked else state.sampler)
        if state.header != now:
            store.update(header=now)
        saved = SavedSession(chat, name, paths, lock, store, head)
        if not head:
            chat.record_turns()
        return saved
    except BaseException:
        if store:
            store.close()
        lock.close()
        raise


def new_chat(
    model: Model,
    options: SessionOptions,
    notify: Notify,
    began: str | None = None,
) -> ChatSession:
    """Make a session; one that began before has the date of then in its template."""
    template = model.tokenizer.template
    if template and began:
        template = template.at(datetime.fromisoformat(began).astimezone())
    return ChatSession(
        model,
        options.system or None,
        options.window,
        options.sinks,
        options.sampling,
        options.max_tokens,
        options.stop,
        notify,
        options.evict or "turn",
        template=template,
        kv_bits=options.kv_bits,
        speculate=options.speculate,
        draft=options.draft,
    )


def merge_options(options: SessionOptions, header: SessionHeader) -> SessionOptions:
    """Return options with what is not given taken from the session."""
    return replace(
        options,
        system=header.system if options.system is None else options.system,
        window=header.window if options.window is None else options.window,
        sinks=header.sinks if options.sinks is None else options.sinks,
        evict=header.evict if options.evict is None else options.evict,
        kv_bits=header.kv_bits if options.kv_bits is None else options.kv_bits,
    )


def changes(before: SessionHeader, now: SessionHeader, model: Model) -> str:
    """Return what is not as it was, in words; "" if a snapshot of before can be used."""
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
    """Bring the stream to where the transcript ends; a coroutine.

    Returns:
        The head of the transcript if the snapshot holds all of it as it is, else "".
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
            reason = quarantine(paths, str(error))
    turns = store.turns(min(first, state.first))
    missing = {t.number: t.exchange for t in turns if t.number >= first and t.state == ANSWERED}
    if state.first >= first and not closes_previous(missing, state.first):
        chat.clear()
        missing = {number: missing[number] for number in missing if number >= state.first}
    if missing:
        head = ""
        notify(
            f"reading {plural(len(missing))} again: {reason}; replies may differ from those of a "
            "conversation that was never closed"
        )
        yield from chat.replay_steps(missing, progress)
    chat.clear(state.first)
    chat.number = state.count
    if state.first <= state.count and turns[-1].state == ASKED:
        chat.unanswered = turns[-1].exchange.question
        notify("the last question was not answered, the program ended before: /retry answers it")
    return head


def closes_previous(exchanges: Mapping[int, Exchange], number: int) -> bool:
    """Say whether a turn closed one before it; where it did not, that was cleared."""
    return number in exchanges and bool(exchanges[number].closing_ids)


def restore(chat: ChatSession, store: Store, paths: SessionPaths) -> SnapshotMetadata:
    """Put the stream where the snapshot says.

    Raises:
        SnapshotError, ValueRefused: there is none, or it is not this conversation's.
    """
    path, transcript = paths.snapshot, store.state
    beside = BYTES_BESIDE + BYTES_PER_ID * chat.cache.geometry.rows
    if not os.path.lexists(path):
        raise SnapshotError("there is no snapshot")
    if not is_file(path):
        raise SnapshotError(f"{path.name} is a link or no file")
    found = snapshot.load_snapshot(path, chat.cache.nbytes + beside, beside)
    about = parse_metadata(found)
    if not chat.model.is_fingerprint(found.model) or about.session != transcript.header.id:
        raise SnapshotError(f"{path.name} belongs to another model or conversation")
    if not about.is_of(store, found):
        raise SnapshotError(f"{path.name} holds what was taken back since")
    exchanges = store.exchanges(about.state.first)
    if [n for n in exchanges if n <= about.state.turns] != [n for n, _ in about.state.places]:
        raise SnapshotError(f"{path.name} leaves out what was said")
    chat.tokens.restore(found.state)
    chat.resume(about.state, exchanges)
    return about


def quarantine(paths: SessionPaths, reason: str) -> str:
    """Move a snapshot that cannot be used out of the way; return why."""
    path = paths.snapshot
    if os.path.lexists(path):
        try:
            path.replace(paths.quarantine)
        except OSError as error:
            return f"{reason}; it cannot be moved away: {error.strerror}"
    return reason
