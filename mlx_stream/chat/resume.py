"""A saved conversation -> one that goes on: from its snapshot, or from what was said.

From a snapshot nothing is read again, and what follows is bit for bit what would have followed. A
snapshot that is missing, damaged or another model's is not used: then what was attended is read
again from the transcript, and that is said.
"""

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from mlx_stream.chat.conversation import Conversation, SavedSession
from mlx_stream.chat.exchange import Exchange, plural
from mlx_stream.chat.schema import SessionHeader
from mlx_stream.chat.session import DEFAULT_MAX_TOKENS, ChatSession
from mlx_stream.chat.session_files import session_paths
from mlx_stream.chat.snapshot_metadata import SnapshotMetadata, parse_metadata
from mlx_stream.chat.store import Store
from mlx_stream.errors import SnapshotError, ValueRefused
from mlx_stream.generate import snapshot
from mlx_stream.load import Model
from mlx_stream.program.lock import Lock
from mlx_stream.program.notices import Notify, discard
from mlx_stream.program.paths import is_file
from mlx_stream.sampling import Sampling

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
        return store.header


def begin(model: Model, options: SessionOptions, notify: Notify = discard) -> Conversation:
    """Begin a conversation that is not saved."""
    return Conversation(new_chat(model, options, notify))


def open_session(
    name: str,
    model: Model,
    options: SessionOptions,
    notify: Notify = discard,
    progress: Callable[[int, int], None] | None = None,
) -> Conversation:
    """Do all of `opening` at once."""
    steps = open_steps(name, model, options, notify, progress)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def open_steps(
    name: str,
    model: Model,
    options: SessionOptions,
    notify: Notify = discard,
    progress: Callable[[int, int], None] | None = None,
) -> Generator[None, None, Conversation]:
    """Go on with the conversation saved as `name`, or begin it; yields while it is read again.

    Args:
        notify: told in one line what is read again, and why.
        progress: called while that happens, with the tokens read and those to read.

    Raises:
        SessionError: another process has it open, or it is damaged.
        MlxStreamError: as `ChatSession`.
    """
    where = session_paths(name)
    lock = Lock.acquire(where.lock)
    store = None
    if options.speculate is None and options.draft is None:
        # What is saved goes on to the bit, which guesses, timed as they are, would not.
        options = replace(options, speculate=False)
    try:
        snapshot.sweep_partial(where.snapshot)
        if not where.database.exists():
            chat = new_chat(model, options, notify)
            lock.close()
            new = Conversation(chat)
            new.saved = SavedSession.create(name, new.header(), chat.sampler.state())
            return new
        store = Store.open(where.database)
        header = store.header
        chat = new_chat(model, merge_options(options, header), notify, header.created)
        conversation = Conversation(chat, SavedSession(name, where, lock, store))
        now = replace(conversation.header(), id=header.id, created=header.created)
        seeded = chat.sampler.state()
        yield from catch_up(conversation, changes(header, now), notify, progress)
        asked = options.sampling is not None and options.sampling.seed is not None
        chat.sampler.restore(seeded if asked else store.progress.sampler)
        if header != now:
            store.update(header=now)
        return conversation
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


def changes(before: SessionHeader, now: SessionHeader) -> str:
    """Return what is not as it was, in words; "" if a snapshot of before can be used."""
    differ = [name for name in WORDS if getattr(before, name) != getattr(now, name)]
    if not differ:
        return ""
    return f"{' and '.join(WORDS[name] for name in differ)} changed"


def catch_up(
    conversation: Conversation,
    changed: str,
    notify: Notify,
    progress: Callable[[int, int], None] | None,
) -> Iterator[None]:
    """Bring the stream to where the transcript ends."""
    saved, chat = conversation.saved, conversation.chat
    assert saved is not None
    store = saved.store
    count, oldest = store.count, store.progress.first
    if count == 0:
        return
    first = oldest
    reason = changed
    if not changed:
        try:
            about = restore(conversation, saved)
            first = about.count + 1
            conversation.set_snapshot_head(about.head)
            reason = f"they are not in {saved.where.snapshot.name}"
        except (SnapshotError, ValueRefused) as error:
            chat.restart(chat.system, chat.stats.window)
            reason = quarantine(saved, str(error))
    exchanges = store.exchanges(first)
    if oldest >= first and not closes_previous(exchanges[oldest - first :]):
        chat.clear()
        exchanges = exchanges[oldest - first :]
    missing = reencode(chat, exchanges)
    if missing:
        notify(
            f"reading {plural(len(missing))} again: {reason}; replies may differ from those of a "
            "conversation that was never closed"
        )
        yield from chat.replay_steps(missing, progress)
    chat.clear(keep=count - oldest + 1)


def closes_previous(exchanges: Sequence[Exchange]) -> bool:
    """Say whether the first of them closed one before it; where it did not, that was cleared."""
    return bool(exchanges and exchanges[0].closing_ids)


def restore(conversation: Conversation, saved: SavedSession) -> SnapshotMetadata:
    """Put the stream where the snapshot says.

    Raises:
        SnapshotError, ValueRefused: there is none, or it is not this conversation's.
    """
    chat, store, path = conversation.chat, saved.store, saved.where.snapshot
    beside = BYTES_BESIDE + BYTES_PER_ID * chat.cache.geometry.rows
    if not os.path.lexists(path):
        raise SnapshotError("there is no snapshot")
    if not is_file(path):
        raise SnapshotError(f"{path.name} is a link or no file")
    found = snapshot.load_snapshot(path, chat.cache.nbytes + beside, beside)
    about = parse_metadata(found.about)
    if found.model != conversation.model or about.session != store.header.id:
        raise SnapshotError(f"{path.name} belongs to another model or conversation")
    if about.count > store.count or store.head(about.count) != about.head:
        raise SnapshotError(f"{path.name} holds what was taken back since")
    chat.tokens.restore(found.state)
    held = len(about.state.places)
    exchanges = store.exchanges(about.count - held + 1)[:held]
    chat.resume(about.state, exchanges)
    return about


def quarantine(saved: SavedSession, reason: str) -> str:
    """Move a snapshot that cannot be used out of the way; return why."""
    path = saved.where.snapshot
    if os.path.lexists(path):
        try:
            path.replace(saved.where.quarantine)
        except OSError as error:
            return f"{reason}; it cannot be moved away: {error.strerror}"
    return reason


def reencode(chat: ChatSession, exchanges: Sequence[Exchange]) -> list[Exchange]:
    """Return exchanges in this model's ids: what another model said is read as text."""
    found: list[Exchange] = []
    rest = chat.conversation_state().pending.rest
    for exchange in exchanges:
        closing, question = chat.prompts.following(rest, exchange.question)
        text = chat.model.tokenizer.decode(exchange.reply_ids) + exchange.rest
        known = chat.accepts_reply(exchange.reply_ids)
        if exchange.question_ids != tuple(question) or text != exchange.reply or not known:
            exchange = replace(exchange, reply_ids=(), rest=exchange.reply)
        exchange = replace(exchange, closing_ids=tuple(closing), question_ids=tuple(question))
        found.append(exchange)
        rest = chat.prompts.rest_of(exchange)
    return found
