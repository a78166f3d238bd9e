"""Clients that send their whole history each time, and what the stream that answers them holds."""

from collections.abc import Sequence
from typing import Any

from mlx_stream.chat.exchange import unread_ids
from mlx_stream.chat.messages import Message
from mlx_stream.chat.session import ChatSession
from mlx_stream.server.conversation import conversation_of
from mlx_stream.server.line_reply import LineReply
from mlx_stream.server.lines import Lines
from mlx_stream.text.pieces import Piece
from tests.fakes.conversations import said
from tests.fakes.engines import GREEDY, eventually

SYSTEM = Message("system", "Be brief.")
HEAD = {"think", "reasoning_effort", "tools"}


class Client:
    """One client of a server.

    Args:
        options: the options of each request.

    Attributes:
        messages: what it sends, without the next question.
        reply: the last reply; `pieces` are its pieces.
    """

    def __init__(self, lines: Lines, messages: Sequence[Message] = (SYSTEM,), **options: Any):
        self.lines, self.messages = lines, [*messages]
        self.options = {"sampling": GREEDY, "max_tokens": 8} | options
        self.reply: Any = None
        self.pieces: list[Piece] = []

    def begin(self, *question: str | Message, **options: Any) -> LineReply:
        """Send the history and a question."""
        options = self.options | options
        asked = [Message("user", q) if isinstance(q, str) else q for q in question]
        head = {name: options.pop(name) for name in HEAD & options.keys()}
        self.messages += asked
        self.reply = self.lines.begin(conversation_of(self.messages, **head), **options)
        return self.reply

    def ask(self, *question: str | Message, **options: Any) -> LineReply:
        """Send the history and a question, and add the reply to the history."""
        reply = self.begin(*question, **options)
        self.pieces = [*reply]
        thinking = "".join(piece.thinking for piece in self.pieces)
        self.messages.append(Message("assistant", self.said, reply.calls, thinking=thinking))
        return reply

    @property
    def said(self) -> str:
        return said(self.pieces)

    def take_back(self, exchanges: int) -> None:
        """Forget the last exchanges, each a question and a reply."""
        del self.messages[len(self.messages) - 2 * exchanges :]

    def trim(self, exchanges: int) -> None:
        """Leave out the oldest exchanges."""
        first = sum(message.role == "system" for message in self.messages)
        del self.messages[first : first + 2 * exchanges]

    @property
    def texts(self) -> list[tuple[str, str]]:
        """The questions and replies of its history, each of one message."""
        rest = [message.text for message in self.messages if message.role != "system"]
        return [*zip(rest[::2], rest[1::2], strict=True)]

    @property
    def chat(self) -> ChatSession:
        """The conversation of the line that answered last."""
        assert self.reply
        return chat_of(self.lines, self.reply.line)


def chat_of(lines: Lines, number: int) -> ChatSession:
    """Return a line's conversation once nothing is being computed."""
    eventually(lambda: not lines.engine._worker.busy())
    (line,) = (line for line in lines._lines if line.id == number)
    chat = line.session._session_worker.chat
    assert chat
    return chat


def ids_to_attend(chat: ChatSession) -> list[int]:
    """Return the ids that a conversation attends to, and those it reads next."""
    turns = chat._settle()
    unread = unread_ids(chat.prompts.pinned, turns, chat.tokens.length)
    return [*chat.tokens.ids.attended(), *unread]


def attended_texts(chat: ChatSession) -> list[tuple[str, str]]:
    return [(exchange.question, exchange.reply) for exchange in chat.exchanges]
