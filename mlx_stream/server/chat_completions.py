"""OpenAI's chat completions: a request's messages, and the format of the response."""

import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from mlx_stream.chat.messages import Message
from mlx_stream.chat.session_files import session_paths
from mlx_stream.engine.handle import EngineReplyOptions
from mlx_stream.errors import SessionError, one_line
from mlx_stream.server.api_errors import ApiError
from mlx_stream.server.conversation import Conversation, conversation_of
from mlx_stream.server.event_stream import off_loop
from mlx_stream.server.named_sessions import BegunSession
from mlx_stream.server.reply_answer import Events, ReplyAnswer, ReplyCounts
from mlx_stream.server.request_body import parse_body
from mlx_stream.server.schemas import ChatRequest
from mlx_stream.server.service import ModelService
from mlx_stream.text.pieces import Piece, TokenLogprob

# The limit if the client sets none. Small models may repeat the same line forever.
DEFAULT_ANSWER_TOKENS = 4_096
LARGE = 256 * 1024  # bytes; processing such a body takes longer than a thread switch
DONE = "[DONE]"
FINISHES = {"end": "stop", "stop": "stop", "length": "length"}
# What OpenAI reports for a token with probability 0.
LOWEST_LOGPROB = -9_999.0
BytesOf = Callable[[int], bytes]


class ChatCompletions:
    """The ASGI application for chat completions."""

    def __init__(self, service: ModelService):
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self.service
        async with service.admitted():
            body = scope["state"].pop("body")
            large = len(body) > LARGE
            request, conversation = await off_loop(large, read_request, body)
            del body  # a long history is not kept while its reply is written
            service.check_name(request.model)
            options, limit = reply_options(request), request.limit or DEFAULT_ANSWER_TOKENS
            counts = ReplyCounts(not request.stream)
            counts.session = name = session_name(request, scope)
            engine = await service.loaded()
            if name is None:
                pieces = line_pieces(service, conversation, limit, options, counts, large)
            else:
                pieces = session_pieces(service, name, conversation, limit, options, counts)
            del conversation
            form = ChatFormat(request, request.model, engine.bytes_of)
            answer = ReplyAnswer(service, counts, pieces, form, request.all_unknown)
            await answer.send(bool(request.stream), scope, receive, send)


def read_request(body: bytearray) -> tuple[ChatRequest, Conversation]:
    """Return a request without its messages, and the messages.

    Raises:
        ApiError, ValueRefused, TextError: see `parse_body` and `conversation_of`.
    """
    request = parse_body(body, ChatRequest)
    conversation = conversation_of(
        [as_message(message) for message in request.messages],
        think=request.think,
        reasoning_effort=request.reasoning_effort,
    )
    request.messages.clear()
    return request, conversation


def as_message(message: Any) -> Message:
    role = "system" if message.role == "developer" else message.role
    return Message(role, message.text, id=message.tool_call_id or "")


def reply_options(request: ChatRequest) -> EngineReplyOptions:
    found: EngineReplyOptions = {"sampling": request.sampling}
    if request.stops:
        found["stop"] = request.stops
    if bias := request.bias:
        found["bias"] = bias
    if request.logprobs:
        found["logprobs"] = request.top_logprobs or 0
    return found


async def line_pieces(
    service: ModelService,
    conversation: Conversation,
    limit: int,
    options: EngineReplyOptions,
    counts: ReplyCounts,
    large: bool,
) -> AsyncGenerator[Piece | None, None]:
    """Yield None once a reply has begun on one of the streams, and then its pieces."""
    given: EngineReplyOptions = {**options, "progress": counts.report}
    async with service.stream():
        reply = await service.begin(conversation, limit, given, large)
        del conversation
        try:
            counts.reply = await reply.start_async()
            yield None
            async for piece in reply:
                yield piece
        finally:
            reply.cancel()


def session_name(request: ChatRequest, scope: Scope) -> str | None:
    """Return the name of the saved conversation that a request continues.

    Raises:
        ApiError: 400, the name is not valid.
    """
    named = request.mlx_stream.session if request.mlx_stream else None
    name = named or Headers(scope=scope).get("x-mlx-stream-session")
    if name is not None:
        try:
            session_paths(name)
        except SessionError as error:
            raise ApiError(400, one_line(error), "session_name", "mlx_stream.session") from error
    return name


async def session_pieces(
    service: ModelService,
    name: str,
    conversation: Conversation,
    limit: int,
    options: EngineReplyOptions,
    counts: ReplyCounts,
) -> AsyncGenerator[Piece | None, None]:
    """Like `line_pieces`, but on the stream of a saved conversation."""
    if service.sessions is None:
        raise ApiError(400, "saved conversations are not enabled: serve with --sessions", "session")
    given: EngineReplyOptions = {**options, "progress": counts.report}
    items = service.sessions.pieces(name, conversation, limit, given)
    async with service.stream(), aclosing(items):
        async for item in items:
            if isinstance(item, BegunSession):
                counts.reply = item
                yield None
            else:
                yield item


class ChatFormat:
    """The JSON objects of a chat completion."""

    def __init__(self, request: ChatRequest, model: str, bytes_of: BytesOf):
        self._id, self._created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        self._model, self._usage = model, request.include_usage
        self._logprobs, self._bytes_of = bool(request.logprobs), bytes_of

    def first(self) -> Events:
        return [self._chunk({"role": "assistant", "content": ""})]

    def piece(self, piece: Piece) -> Events:
        delta: dict[str, Any] = {}
        if piece.thinking:
            delta["reasoning_content"] = piece.thinking
        if piece.text:
            delta["content"] = piece.text
        if not delta and not piece.logprobs:
            return []
        return [self._chunk(delta, piece.logprobs)]

    def last(self, counts: ReplyCounts, about: Mapping[str, Any]) -> Events:
        ended = self._chunk({}, finish=FINISHES[counts.last.finish or "end"])
        found: list[Mapping[str, Any] | str] = [{**ended, "mlx_stream": about}]
        if self._usage:
            found.append(
                {**self._head("chat.completion.chunk"), "choices": [], "usage": counts.usage}
            )
        return [*found, DONE]

    def whole(self, counts: ReplyCounts, about: Mapping[str, Any]) -> Mapping[str, Any]:
        message = {"role": "assistant", "content": "".join(counts.text), "refusal": None}
        if thinking := "".join(counts.thinking):
            message["reasoning_content"] = thinking
        choice = {
            "index": 0,
            "message": message,
            "logprobs": self._logprobs_of(counts.logprobs) if self._logprobs else None,
            "finish_reason": FINISHES[counts.last.finish or "end"],
        }
        head = self._head("chat.completion")
        return {**head, "choices": [choice], "usage": counts.usage, "mlx_stream": about}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": None,
        }

    def _chunk(
        self,
        delta: Mapping[str, Any],
        logprobs: Sequence[TokenLogprob] = (),
        finish: str | None = None,
    ) -> dict[str, Any]:
        found = self._logprobs_of(logprobs) if self._logprobs and logprobs else None
        choice = {"index": 0, "delta": delta, "logprobs": found, "finish_reason": finish}
        usage = {"usage": None} if self._usage else {}
        return {**self._head("chat.completion.chunk"), "choices": [choice], **usage}

    def _logprobs_of(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        content = [
            {
                **self._token(one.id, one.logprob),
                "top_logprobs": [self._token(id, logprob) for id, logprob in one.top],
            }
            for one in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, id: int, logprob: float) -> dict[str, Any]:
        data = self._bytes_of(id)
        return {
            "token": data.decode(errors="replace"),
            "logprob": max(logprob, LOWEST_LOGPROB),
            "bytes": [*data],
        }
