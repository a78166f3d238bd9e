"""Completions of plain text, as in OpenAI's older API, without a chat template."""

import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass, replace
from typing import Any

from starlette.types import Receive, Scope, Send

from mlx_stream.engine.engine import Engine
from mlx_stream.engine.handle import TextReply
from mlx_stream.errors import ValueRefused
from mlx_stream.generate.stats import Stats
from mlx_stream.server.chat_completions import DONE, FINISHES, LOWEST_LOGPROB, BytesOf
from mlx_stream.server.conversation import longest_text
from mlx_stream.server.reply_answer import Events, ReplyAnswer, ReplyCounts
from mlx_stream.server.request_body import parse_body
from mlx_stream.server.schemas import TextRequest
from mlx_stream.server.service import ModelService
from mlx_stream.text.pieces import Piece, TokenLogprob

DEFAULT_TOKENS = 16  # OpenAI's default


@dataclass
class BegunText:
    """The state of a stream when a text is continued; see `BegunReply`."""

    attended: int
    read: int
    evicted_tokens: int
    window: int
    notices: tuple[str, ...]
    cache: str = "new"
    reason: str = "a text has no earlier turns"
    evicted_turns: int = 0

    @classmethod
    def of(cls, stats: Stats) -> "BegunText":
        attended = min(stats.prompt_tokens, stats.sinks + stats.window)
        evicted = stats.prompt_tokens - attended
        return cls(attended, stats.prompt_tokens, evicted, stats.window, tuple(stats.notices))


class TextCompletions:
    """The ASGI application for text completions."""

    def __init__(self, service: ModelService):
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self.service
        async with service.admitted():
            request = parse_body(scope["state"].pop("body"), TextRequest)
            service.check_name(request.model)
            engine = await service.loaded()
            counts = ReplyCounts(not request.stream)
            pieces = text_pieces(service, engine, request, counts)
            form = TextFormat(request, engine.bytes_of)
            answer = ReplyAnswer(service, counts, pieces, form, request.unknown)
            await answer.send(bool(request.stream), scope, receive, send)


async def text_pieces(
    service: ModelService, engine: Engine, request: TextRequest, counts: ReplyCounts
) -> AsyncGenerator[Piece | None, None]:
    """Yield None, then the pieces of a text, on a separate stream."""
    async with service.stream():
        options = service.options
        assert service.lines
        if len(request.text) > (longest := longest_text(service.lines.window)):
            raise ValueRefused(
                f"the prompt has {len(request.text):,} characters, but at most {longest:,} are "
                "read at once: send less, or use a larger --window"
            )
        reply = engine.complete(
            request.text,
            request.max_tokens or DEFAULT_TOKENS,
            request.sampling,
            request.stops,
            service.lines.window,
            options.sinks,
            options.kv_bits,
            request.bias,
            request.logprobs,
            options.shared,
        )
        with closing(reply):
            async with aclosing(reply.apieces(counts.report)) as pieces:
                async for piece in pieces:
                    if counts.reply is None:
                        counts.reply = BegunText.of(reply.stats)
                        yield None
                    yield with_written(piece, reply)


def with_written(piece: Piece, reply: TextReply) -> Piece:
    """Return a piece; the last one has the number of tokens written."""
    return replace(piece, written=reply.stats.reply_tokens) if piece.finish else piece


class TextFormat:
    """The JSON objects of a completion."""

    def __init__(self, request: TextRequest, bytes_of: BytesOf):
        self._id, self._created = f"cmpl-{secrets.token_hex(12)}", int(time.time())
        self._model, self._usage = request.model, request.include_usage
        self._logprobs, self._bytes_of = request.logprobs is not None, bytes_of
        self._echo, self._offset = request.text if request.echo else "", 0

    def first(self) -> Events:
        return [self._object(self._echo)] if self._echo else []

    def piece(self, piece: Piece) -> Events:
        if not piece.text and not piece.logprobs:
            return []
        return [self._object(piece.text, piece.logprobs)]

    def last(self, counts: ReplyCounts, about: Mapping[str, Any]) -> Events:
        ended = self._object("", finish=FINISHES[counts.last.finish or "end"])
        found: list[Mapping[str, Any] | str] = [{**ended, "mlx_stream": about}]
        if self._usage:
            found.append({**self._object(""), "choices": [], "usage": counts.usage})
        return [*found, DONE]

    def whole(self, counts: ReplyCounts, about: Mapping[str, Any]) -> Mapping[str, Any]:
        finish = FINISHES[counts.last.finish or "end"]
        found = self._object(self._echo + "".join(counts.text), counts.logprobs, finish)
        return {**found, "usage": counts.usage, "mlx_stream": about}

    def _object(
        self, text: str, logprobs: Sequence[TokenLogprob] = (), finish: str | None = None
    ) -> dict[str, Any]:
        choice = {
            "index": 0,
            "text": text,
            "logprobs": self._logprobs_of(logprobs) if self._logprobs and logprobs else None,
            "finish_reason": finish,
        }
        head = {"id": self._id, "object": "text_completion", "created": self._created}
        usage = {"usage": None} if self._usage else {}
        return {**head, "model": self._model, "choices": [choice], **usage}

    def _logprobs_of(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        texts = [self._text_of(token.id) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [max(token.logprob, LOWEST_LOGPROB) for token in tokens],
            "top_logprobs": [
                {self._text_of(id): max(logprob, LOWEST_LOGPROB) for id, logprob in token.top}
                for token in tokens
            ],
            "text_offset": offsets,
        }

    def _text_of(self, id: int) -> str:
        return self._bytes_of(id).decode(errors="replace")
