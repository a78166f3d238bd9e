"""The ids a conversation reads, turn by turn, and those of its whole render."""

from collections.abc import Sequence

from mlx_stream.chat.exchange import Exchange
from mlx_stream.chat.prompts import PromptBuilder
from mlx_stream.text.template.chat_template import (
    ChatTemplate,
    MessageDict,
    assistant,
    system_turn,
    user,
)
from mlx_stream.text.tokenizer import Tokenizer


def read_ids(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    system: str | None,
    exchanges: Sequence[tuple[str, str]],
    unread: str = "",
    then: str | None = None,
) -> list[int]:
    """Return the ids that a stream reads for a conversation, including those that close it.

    Args:
        then: a last question to read as well.
        unread: the end of each reply, read as text after its ids, as if a stop string had begun
            inside an id.
    """
    turns = PromptBuilder(tokenizer, template, system, pin=True)
    ids, last = [*turns.pinned], None
    for number, (question, reply) in enumerate(exchanges, 1):
        closing, asked = turns.question(question, last, number == 1)
        said = reply.removesuffix(unread)
        said_ids = tokenizer.encode(template.lead + said, special=False, behind_text=True)
        exchange = Exchange(question, reply, closing, asked, tuple(said_ids), unread)
        last = turns.settle(exchange, number == 1)
        ids += closing + last.ids
    closing, asked = turns.question(then or "x", last, first=False)
    return [*ids, *closing, *(asked if then else ())]


def replied(reply: str) -> Exchange:
    """Return an exchange whose reply has a text and no ids."""
    return Exchange("x", reply, (), (), (), rest=reply)


def whole_ids(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    system: str | None,
    exchanges: Sequence[tuple[str, str]],
    then: str | None = None,
) -> list[int]:
    """Return the ids of the whole render, with each reply's text as it was sampled.

    Args:
        then: a last question, to be followed by the generation prompt.
    """
    messages: list[MessageDict] = [*system_turn(system)]
    for question, reply in exchanges:
        messages += [user(question), assistant(reply)]
    messages += [user(then)] if then else []
    return tokenizer.encode(template.render(messages, reply=then is not None), special=False)
