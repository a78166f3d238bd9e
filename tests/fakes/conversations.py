"""What must be true of every conversation after each turn, for tests and measurements."""

import re
from collections.abc import Iterable
from typing import Any

from mlx_stream.chat.exchange import unread_ids
from mlx_stream.chat.saving import SavedSession
from mlx_stream.chat.session import ChatSession
from mlx_stream.chat.template_messages import escaped_calls, message_dicts
from mlx_stream.text.control_tokens import MARK
from mlx_stream.text.pieces import Piece
from mlx_stream.text.template.chat_template import stand_in, tool_results, user

QUESTIONS = ("Hello there.", "And then?\nTell me.", "Why äöü €?", "Go on", "x" * 30)


def said(pieces: Iterable[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def pieces_of(chat: Any, act: str, question: str) -> Any:
    """Retry, edit, or, for any other act, ask; return the pieces."""
    if act == "retry":
        return chat.retry()
    return chat.edit(question) if act == "edit" else chat.reply(question)


def leave_unanswered(saved: SavedSession, question: str) -> None:
    """Leave a question and its session as a program killed during the reply would."""
    pieces = saved.chat.reply(question)
    next(pieces)
    saved.chat.recorder = None
    pieces.close()
    saved._let_go()


def assert_well_formed(chat: ChatSession) -> None:
    """Check that a stream holds what the template renders, and no more than its window.

    The tokens attended, and those to be read before the next question, must be the text of the
    pinned beginning and of the attended exchanges as rendered once that question is added. Of a
    turn longer than the window, or one evicted token by token, only the end is attended.
    """
    turns, cache, pinned = chat._settle(), chat.cache, [*chat.prompts.pinned]
    attended, sinks = chat.tokens.ids.attended(), cache.geometry.sinks
    assert cache.attended <= sinks + cache.geometry.window and len(pinned) <= sinks
    unread = unread_ids(pinned, turns, chat.tokens.length)
    # Sinks beyond the pinned ids stay after their turn is evicted.
    first = attended[: sinks if turns and turns[0].start < sinks else min(sinks, len(pinned))]
    ids = [*first, *attended[sinks:], *unread]
    assert ids[: len(pinned)] == pinned[: len(ids)]
    if not turns:
        assert len(ids) <= len(pinned) and chat.exchanges == []
        return
    end = chat.prompts.end_of(chat.exchanges[-1]).replace(MARK, "")
    whole = joined_damage(rendered(chat))
    if turns[0].exchange.answers_calls:  # its calls were evicted
        held = joined_damage(decoded(chat, [*attended[sinks:], *unread]) + end)
        assert whole.endswith(held.removeprefix("\ufffd")) and len(whole) < 2 * len(held) + 999
        return
    if turns[0].start >= cache.oldest or not cache.evicted:
        held = joined_damage(decoded(chat, ids) + end)
        assert held == whole, f"held {held!r}, but rendered {whole!r}"
    else:
        text = joined_damage(decoded(chat, [*attended[sinks:], *unread]) + end)
        assert whole.endswith(text.removeprefix("\ufffd"))


def rendered(chat: ChatSession) -> str:
    """Return the attended exchanges as the template writes them once the next message follows."""
    template, messages = chat.prompts.template, [*chat.prompts.head]
    if chat.exchanges[0].answers_calls:
        messages += stand_in(message_dicts(chat.exchanges[0].asked))
    for exchange in chat.exchanges:
        messages += message_dicts(exchange.asked)
        answer = template.answer(
            exchange.reply, exchange.thinking, escaped_calls(exchange.calls, str)
        )
        if template.style and not template.thinking_apart:  # it stays as it was written
            text = decoded(chat, [*exchange.reply_ids]) + exchange.rest
            answer = {**answer, "content": text}
        messages.append(answer)
    following = tool_results(messages[-1].get("tool_calls", ()), "NEXT") or [user("NEXT")]
    whole = template.render([*messages, *following], reply=True)
    asked = template.turn(following, chat.prompts.texts.system)
    assert whole.endswith(asked)
    return whole.removesuffix(asked)


def decoded(chat: ChatSession, ids: list[int]) -> str:
    backend: Any = chat.model.tokenizer._backend
    return backend.decode(ids, skip_special_tokens=False)


def joined_damage(text: str) -> str:
    """Join runs of replacement characters: text decoded in parts may have more of them."""
    return re.sub("\ufffd+", "\ufffd", text)
