"""Turns sampled ids into final text: thinking, answer, stop strings; independent of streams."""

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_stream.errors import ValueRefused
from mlx_stream.recall.quote import Passage
from mlx_stream.text.thinking import Phase, ThinkingRules
from mlx_stream.text.tokenizer import StreamDecoder
from mlx_stream.text.tool_calls import CallReader, CallStyle, ToolCall


@dataclass(frozen=True)
class TokenLogprob:
    """The natural logarithm of a token's probability under the model, before any sampling option.

    Attributes:
        id: the token's id.
        logprob: the log-probability of the chosen token.
        top: the likeliest ids at that position and their log-probabilities, likeliest first.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """A piece of text that is final.

    Attributes:
        text: a part of the answer, without tool calls.
        finish: on the last piece, why the text ended: end, stop, length, or superseded by another
            request to the same conversation.
        attended: on the last piece of a conversation's reply, the number of attended tokens.
        evicted_exchanges, evicted_tokens: on the same piece, how many were evicted in this turn.
        thinking: a part of the model's thinking, which is not part of the answer.
        read, written: on the last piece, the numbers of tokens read for this reply and written in
            it.
        thinking_tokens: on the same piece, the written tokens that are not part of the answer.
        settled: on the same piece, the number of tokens reread since the previous reply so that the
            stream matches the template's rendering.
        logprobs: if requested, the log-probabilities of each token sampled since the previous
            piece.
        recalled: on the last piece, the quotations of earlier exchanges that preceded the question.
        recalled_tokens: on the same piece, the length of the quotation in tokens.
    """

    text: str
    finish: str | None = None
    attended: int | None = None
    evicted_exchanges: int = 0
    evicted_tokens: int = 0
    thinking: str = ""
    read: int = 0
    written: int = 0
    thinking_tokens: int = 0
    settled: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    recalled: tuple[Passage, ...] = ()
    recalled_tokens: int = 0


class StopMatcher:
    """Hold back text in which a stop string may have begun."""

    def __init__(self, stops: str | Sequence[str]):
        self.stops = (stops,) if isinstance(stops, str) else tuple(stops)
        if not all(self.stops):
            raise ValueRefused("`stop` must not be an empty string")
        self.pending = ""
        self._longest = (
            max(map(len, self.stops), default=1) - 1
        )  # the longest part of a stop string that may be held back

    def add(self, text: str) -> tuple[str, bool]:
        """Return the text that is final, and whether a stop string follows it.

        If several stop strings overlap, the one that ends first stops the text.
        """
        self.pending += text
        found = [(at + len(s), at) for s in self.stops if (at := self.pending.find(s)) >= 0]
        if found:
            final, self.pending = self.pending[: min(found)[1]], ""
            return final, True
        keep = self._partial_match()
        final = self.pending[: len(self.pending) - keep]
        self.pending = self.pending[len(self.pending) - keep :]
        return final, False

    def flush(self) -> str:
        """Return the text still held back when the reply ends."""
        held, self.pending = self.pending, ""
        return held

    def _partial_match(self) -> int:
        """Return the length of the longest suffix of the text that is a prefix of a stop string."""
        for length in range(min(self._longest, len(self.pending)), 0, -1):
            end = self.pending[len(self.pending) - length :]
            if any(stop.startswith(end) for stop in self.stops):
                return length
        return 0


class ReplyDecoder:
    """Turn sampled ids into pieces of text.

    With `remember`, `final_ids` tells which ids make up the final text. Without it, memory use does
    not grow with the length of the text.

    Args:
        thinking: the rules for replies of a thinking model; None for other models.
        call_style: how the model calls tools, if it has tools.
    """

    def __init__(
        self,
        decoder: StreamDecoder,
        stops: str | Sequence[str],
        remember: bool = True,
        thinking: ThinkingRules | None = None,
        call_style: CallStyle | None = None,
    ):
        self.decoder, self.matcher, self.remember = decoder, StopMatcher(stops), remember
        self.rules = thinking or ThinkingRules()
        self.reader = self.rules.reader()
        self.call_style, self.call_reader = call_style, CallReader(call_style)
        self.count = 0
        self.answer_count = 0  # how many ids have been added since the answer began
        self.ids: list[int] = []
        self._decoded = 0  # how many of the ids have been decoded
        self.text = ""  # all decoded text, including thinking and markers
        self.answer_at = 0  # where the answer begins in the text
        self._thought = ""  # thinking not yet returned
        self.ends: list[int] = []  # the length of the text after each id
        self.final = 0  # the length of the text returned so far
        self.stopped = False
        self.finish = "interrupted"  # until it ends some other way

    def add(self, token: int) -> str:
        """Add a sampled id; return the text that has become final."""
        if self.remember:  # an interrupt in between leaves an end without an id, which is harmless
            self.ends.append(len(self.text))
            self.ids.append(token)
        self.count += 1
        text = self._advance(self.decoder.add(token))
        self.answer_count += self.reader.phase is Phase.ANSWER
        self._decoded = len(self.ids)
        return text

    def begin_with(self, ids: Sequence[int]) -> None:
        """Add the ids of a given beginning; they do not count toward the answer's limit."""
        for id in ids:
            self.add(id)
        self.answer_count = 0
        self.take_thinking()

    def take_thinking(self) -> str:
        """Return the thinking that has become final since the last call."""
        thought, self._thought = self._thought, ""
        return thought

    @property
    def thinking(self) -> str:
        """All the thinking, without surrounding whitespace."""
        return self.reader.thinking.strip()

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        """The reply's tool calls, available once it has been flushed."""
        return self.call_reader.calls

    def left(self, limit: int) -> int:
        """Return how many more ids the answer (at most `limit` ids) or the thinking may have."""
        if self.reader.phase is Phase.THINKING:
            return self.rules.limit - self.count
        return limit - self.answer_count

    def cut_thinking(self) -> tuple[int, ...]:
        """End the thinking and return the ids that end it; the answer follows."""
        for id in self.rules.cut:
            self.add(id)
        self.reader.phase = Phase.ANSWER
        return self.rules.cut

    def cut(self, length: int) -> None:
        """End the answer after `length` characters, which must have been returned."""
        self.final, self.stopped = min(self.final, self.answer_at + length), True

    def is_end(self, token: int) -> bool:
        """Return whether an id ends the reply here, not counting ids that end any reply."""
        return token in self.rules.ends and self.reader.phase is Phase.ANSWER

    def flush(self) -> str:
        """Return the text held back; no more ids may follow."""
        if self.stopped:
            return ""
        if self._decoded != len(self.ids):
            self._decode_again()
        self._decoded = -1  # an interrupt loses the decoder's text; then all ids are decoded again
        text = self._advance(self.decoder.flush(), last=True) if self.count else ""
        self._decoded = len(self.ids)
        if self.stopped:
            return text
        rest = self.matcher.flush()
        self.final += len(rest)
        return text + rest

    def final_ids(self, trim: bool = False) -> tuple[int, str]:
        """Return how many ids lie within the final text, and the final text that follows them.

        A stop string may begin in the middle of an id. `trim` drops trailing whitespace, for
        templates that do so.
        """
        final = self.final if self.stopped else len(self.text)
        if trim:
            final = len(self.text[:final].rstrip())
        elif not self.stopped:
            return len(self.ids), ""
        count = self._ids_within(final)
        if self._end(count) == final:
            return count, ""
        # The stop string begins inside an id. Drop that id, along with any preceding ids that hold
        # the first bytes of a character it completes.
        start = self._end(count - 1)
        return self._ids_within(start), self.text[start:final]

    def final_text(self, trim: bool = False) -> str:
        """Return the final answer."""
        text = self.text[self.answer_at : self.final if self.stopped else None]
        if self.calls:
            text = text[: self.call_reader.begin]
        return text.rstrip() if trim else text

    def _decode_again(self) -> None:
        """Decode all ids again, because an interrupt cut `add` short."""
        self.decoder.flush()
        self.text, self.ends, self.reader = "", [], self.rules.reader()
        self.call_reader = CallReader(self.call_style)
        for token in self.ids:
            self._read(self.decoder.add(token))
            self.ends.append(len(self.text))
        self.count = self._decoded = len(self.ids)

    def _end(self, count: int) -> int:
        return self.ends[count - 1] if count else 0

    def _ids_within(self, length: int) -> int:
        """Return the smallest number of ids whose text has at least this length."""
        return next(k for k in range(len(self.ids) + 1) if self._end(k) >= length)

    def _advance(self, text: str, last: bool = False) -> str:
        final = self._read(text, last)
        if self.remember and self.ids:
            self.ends[len(self.ids) - 1] = len(self.text)
        if self.matcher.stops:
            final, self.stopped = self.matcher.add(final)
        self.final += len(final)
        return final

    def _read(self, text: str, last: bool = False) -> str:
        """Add decoded text; return the part that is known to belong to the answer."""
        if self.remember:
            self.text += text
        answer = text
        if self.reader.phase is not Phase.ANSWER:
            thought, answer = self.reader.add(text)
            if last:
                rest = self.reader.flush()
                thought, answer = thought + rest[0], answer + rest[1]
            self._thought += thought
            self.final = self.answer_at = len(self.text) - len(answer)
        if self.call_style:
            answer = self.call_reader.add(answer)
            answer += self.call_reader.flush() if last else ""
        return answer
