"""What every conversation must be after each of its turns, for tests and measurements."""

from collections.abc import Iterable

from mlx_stream.chat.exchange import unread_ids
from mlx_stream.chat.session import ChatSession
from mlx_stream.text.pieces import Piece


def said(pieces: Iterable[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def attended_text(chat: ChatSession) -> str:
    """Return the text attended, and what will be read of the last exchange before the next."""
    exchanges, turns = chat.exchanges, chat.evictor.state.turns
    unread = unread_ids(chat.prompts.pinned, turns, chat.tokens.length)
    ids = [*chat.tokens.ids.attended(), *unread]
    text = chat.model.tokenizer._backend.decode(ids, skip_special_tokens=False)
    return text + (chat.prompts.rest_of(exchanges[-1]) + chat.template.closing if turns else "")


def rendered(chat: ChatSession) -> str:
    """Return what the model's template makes of the pinned beginning and of what is held."""
    messages = [*chat.prompts.head]
    for exchange in chat.exchanges:
        messages.append({"role": "user", "content": exchange.question})
        messages.append({"role": "assistant", "content": exchange.reply})
    return chat.template.render(messages, reply=False) if messages else ""


def assert_well_formed(chat: ChatSession) -> None:
    assert attended_text(chat) == rendered(chat)
    assert chat.cache.attended <= chat.cache.geometry.sinks + chat.cache.geometry.window


def assert_pinned(chat: ChatSession) -> None:
    """See that the system prompt is what the stream begins with, and that it is all attended."""
    pinned = chat.prompts.pinned
    assert pinned and tuple(chat.tokens.ids.attended()[: len(pinned)]) == pinned
