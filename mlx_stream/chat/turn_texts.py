"""The texts of a conversation's turns, for one template and system prompt; handles no ids."""

from collections.abc import Callable, Sequence

from mlx_stream.chat.exchange import Exchange
from mlx_stream.chat.messages import Message
from mlx_stream.chat.template_messages import message_dicts
from mlx_stream.errors import TemplateError
from mlx_stream.text.template.chat_template import ChatTemplate, MessageDict, Turn

PROBES = ("What is the first?", "Tell me,\nhow many?")


class TurnTexts:
    """Render turns, escaping their texts.

    Attributes:
        system: the system prompt, if the template writes it.
        before: the text before the first question, if it is not the template's own.
        header: the text before each later question, if it is read with the end of the previous
            turn.
    """

    def __init__(self, template: ChatTemplate, escape: Callable[[str], str], system: str | None):
        self.template, self._escape = template, escape
        self.system = None if system is None else escape(system)
        self.before: str | None = None
        self.header = ""

    def opening(self, turn: Turn) -> str:
        """Return all the text up to where the model answers the first question."""
        if self.before is not None:
            return self.before + self.template.turn(turn)
        return self.template.opening(self.system, turn)

    def asked(self, messages: Sequence[Message], first: bool) -> str:
        """Return the text of a turn's messages up to where the model answers."""
        turn = message_dicts(messages, self._escape)
        if first:
            return self.opening(turn)
        return self._without_header(self.template.turn(turn, self.system))

    def settled(
        self, exchange: Exchange, reply: MessageDict, first: bool, later: bool = False
    ) -> str:
        """Return the text of an exchange as it is rendered once another message follows it."""
        turn = message_dicts(exchange.asked, self._escape)
        opens = first and self.before is None
        whole = self.template.settled(turn, reply, self.system, opens, later)
        return (self.before or "") + whole if first else self._without_header(whole)

    def head_of_reply(
        self, exchange: Exchange, reply: MessageDict, first: bool, later: bool
    ) -> str:
        """Return the text of a settled exchange up to where its answer begins."""
        probe = {**reply, "content": PROBES[0]}
        probe.pop("tool_calls", None)
        later = later and self.template.settles_late
        return self.settled(exchange, probe, first, later).removesuffix(PROBES[0])

    def _without_header(self, text: str) -> str:
        if not text.startswith(self.header):
            raise TemplateError("chat template: its text before a question depends on the question")
        return text.removeprefix(self.header)
