"""What a model's reply may contain, and how its ids are decoded; independent of turns."""

import re
from collections.abc import Sequence
from functools import cached_property

from mlx_stream.chat.exchange import Exchange
from mlx_stream.chat.template_messages import escaped_calls
from mlx_stream.errors import TemplateError
from mlx_stream.text.control_tokens import ControlTokens
from mlx_stream.text.pieces import ReplyDecoder
from mlx_stream.text.template.chat_template import ChatTemplate, MessageDict
from mlx_stream.text.thinking import ThinkingRules
from mlx_stream.text.tokenizer import Tokenizer
from mlx_stream.text.tool_calls import CallStyle, call_style_of


class ReplyFormat:
    """The format of one model's replies under one template."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, control: ControlTokens):
        self.tokenizer, self.template, self.control = tokenizer, template, control

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The ids that end a reply wherever they occur."""
        return self.tokenizer.eos_ids | (self.control.end_ids - self.inner_ids)

    @cached_property
    def inner_ids(self) -> frozenset[int]:
        """The control tokens within a reply: around the model's thinking and its tool calls."""
        texts = self.template.style.texts if self.template.style else ""
        if self.call_style:
            texts += "".join(self.call_style.tokens)
        return self.control.ids.intersection(self.tokenizer.encode(texts, special=False))

    @cached_property
    def call_style(self) -> CallStyle | None:
        """How the model calls tools; None if it has no tools.

        Raises:
            TemplateError: the model has tools, but the format of its calls is unknown.
        """
        style = call_style_of(self.template.source)
        if self.template.tools and not style:
            raise TemplateError(
                "this model's template writes tool calls in an unsupported format: leave "
                "out tools, or use another model"
            )
        return style if self.template.tools else None

    def decoder(self, stop: Sequence[str] = (), limit: int = 0) -> ReplyDecoder:
        """Return a decoder for a reply whose thinking has at most `limit` ids."""
        decoder = self.tokenizer.decoder(self.inner_ids)
        return ReplyDecoder(decoder, stop, thinking=self._rules(limit), call_style=self.call_style)

    def _rules(self, limit: int) -> ThinkingRules:
        style, encode = self.template.style, self.tokenizer.encode
        if not style:
            return ThinkingRules()
        names = (encode(name, special=False) for name in style.ends)
        ends = frozenset(ids[0] for ids in names if len(ids) == 1)
        cut = encode(style.cut, special=False, behind_text=True)
        return ThinkingRules(style, self.template.thinks_first, ends, tuple(cut), limit)

    def accepts(self, reply_ids: Sequence[int]) -> bool:
        """Return whether a reply can consist of these ids."""
        size = self.tokenizer.vocab_size
        return all(id < size and id not in self.end_ids for id in reply_ids)

    def is_written_by(self, exchange: Exchange) -> bool:
        """Return whether this model decodes a reply's ids into the texts stored with them."""
        if not self.accepts(exchange.reply_ids):
            return False
        reply = self._read(exchange)
        if [(c.name, c.arguments) for c in reply.calls] != [
            (c.name, c.arguments) for c in exchange.calls
        ]:
            return False
        told = reply.final_text() + exchange.rest, reply.thinking
        return told == (exchange.reply, exchange.thinking)

    def message(self, exchange: Exchange) -> MessageDict:
        """Return a reply in the form in which it is passed to the template.

        A template that has no field for thinking gets what the model wrote, including its markers.
        """

        def escape(text: str) -> str:
            return self.control.escape(text, reply=True)

        style = self.template.style
        said, thinking = escape(exchange.reply), escape(exchange.thinking)
        if style and not self.template.thinking_apart and self.is_written_by(exchange):
            reply = self._read(exchange)
            marks = "|".join(map(re.escape, (*style.openings, style.closing, *style.answers)))
            parts = re.split(f"({marks})", reply.text[: reply.answer_at])
            before = (part if at % 2 else escape(part) for at, part in enumerate(parts))
            said, thinking = "".join(before) + said, ""
        return self.template.answer(said, thinking, escaped_calls(exchange.calls, escape))

    def last_ids(self, exchange: Exchange, text: str) -> tuple[int, ...] | None:
        """Return the ids of `text`, the end of a reply; None if it begins inside a token."""
        ids, reply = exchange.reply_ids, self._read(exchange)
        if not reply.text.endswith(text):
            return None
        begin = len(reply.text) - len(text)
        starts = [0, *reply.ends[:-1]]
        return ids[starts.index(begin) :] if begin in starts else None if text else ()

    def _read(self, exchange: Exchange) -> ReplyDecoder:
        """Return a decoder that has been fed the ids of a reply."""
        reply = self.decoder()
        for id in exchange.reply_ids:
            reply.add(id)
        reply.flush()
        return reply
