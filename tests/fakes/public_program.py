# pyright: strict
"""Uses every public name as an app developer would; pyright checks it strictly."""

import asyncio
import sys
from collections.abc import AsyncGenerator, Generator
from concurrent.futures import Future
from pathlib import Path

import mlx_stream
from mlx_stream import errors

MODEL = sys.argv[1]


def notify(line: str) -> None:
    print(line)


def evicted(exchanges: int, tokens: int) -> None:
    print(exchanges, tokens)


sampling = mlx_stream.Sampling(temperature=0.0, top_k=40, top_p=0.9, min_p=0.1, seed=1)
model: mlx_stream.Model = mlx_stream.load(MODEL, dtype="float32", notify=notify)
stats = mlx_stream.Stats()
for piece in mlx_stream.stream(model, "Once", max_tokens=4, sampling=sampling, stats=stats):
    text: str = piece.text
chat = mlx_stream.ChatSession(model, system="Be brief.", window=256, on_evict=evicted)
reply: Generator[mlx_stream.Piece, None, None] = chat.reply("Hi", max_tokens=4)
pieces: list[mlx_stream.Piece] = list(reply)
finish: str | None = pieces[-1].finish
pieces += chat.retry(max_tokens=4)
pieces += chat.edit("Hello", max_tokens=4)
exchange: mlx_stream.Exchange = chat.undo()
questions: list[str] = [one.question for one in chat.exchanges]
chat.clear()
asked: list[mlx_stream.Message] = [mlx_stream.Message("user", "What now?")]
pieces += chat.reply(asked, max_tokens=4, logprobs=2)
calls: tuple[mlx_stream.ToolCall, ...] = chat.exchanges[-1].calls
speed: float = chat.stats.tokens_per_second

engine = mlx_stream.Engine(MODEL, memory_budget=2 * 10**9, dtype="float32")
try:
    engine.wait(timeout=60)
    session: mlx_stream.Session = engine.session(system="Be brief.", window=256, name=None)
    for piece in session.reply("Hi", max_tokens=4):
        text = piece.text + piece.thinking
    future: Future[mlx_stream.Exchange] = session.undo()
    print(future.result(10).reply, session.exchanges, session.stats.attended, repr(session))

    async def answer() -> str:
        replies: AsyncGenerator[mlx_stream.Piece, None] = session.areply("Why?", max_tokens=4)
        return "".join([one.text async for one in replies])

    print(asyncio.run(answer()))
    listener: mlx_stream.Listener
    with engine.listen(window=256) as listener:
        listener.feed("It rains.\n", timeout=10)
        for piece in listener.ask("What happens?", max_tokens=4, remember=False):
            print(piece.text, end="")
        listener.save(Path("stream.safetensors"), {"line": 1})
        note: dict[str, str | int] | None = listener.restored
except errors.QueueFull as error:
    print("try again later", error)
except errors.MlxStreamError as error:
    print(error)
finally:
    done: bool = engine.close()
