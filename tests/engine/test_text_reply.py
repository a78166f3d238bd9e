"""An engine continues a text as `stream` does; the largest window depends on the session count."""

import asyncio
from pathlib import Path

import pytest

import mlx_stream
from mlx_stream.errors import TextError
from tests.fakes.conversations import said
from tests.fakes.engines import GREEDY, LONG, engine_of, eventually


def test_a_text_is_continued_as_by_stream(tiny: Path) -> None:
    model = mlx_stream.load(tiny, dtype="float32", keep_quantized=False)
    expected = said(mlx_stream.stream(model, LONG, 20, GREEDY, window=64))
    read = list[tuple[int, int]]()
    with engine_of(tiny) as engine:
        reply = engine.complete(LONG, 20, GREEDY, window=64, shared=False)
        assert said(reply.pieces(lambda *counts: read.append(counts))) == expected
        assert reply.stats.reply_tokens == 20 and reply.stats.prompt_tokens == read[-1][1]
        assert read[0][0] < read[-1][0] == read[-1][1]
        weights = engine.memory[0] - reply.stats.cache_bytes
        reply.close()
        eventually(lambda: engine.memory[0] == weights)

        async def ask() -> str:
            found = engine.complete(LONG, 20, GREEDY, window=64, shared=False)
            return "".join([piece.text async for piece in found.apieces()])

        assert asyncio.run(ask()) == expected


def test_logprobs_and_bias_are_those_of_replies(tiny: Path) -> None:
    with engine_of(tiny) as engine:
        engine.wait()
        z = next(id for id in range(300) if engine.bytes_of(id) == b"z")
        reply = engine.complete("The man", 4, GREEDY, bias={z: 100.0}, logprobs=2)
        pieces = [*reply.pieces()]
        tokens = [token for piece in pieces for token in piece.logprobs]
        assert said(iter(pieces)) == "zzzz" and [token.id for token in tokens] == [z] * 4
        assert all(len(token.top) == 2 for token in tokens)


def test_an_empty_text_is_refused_and_the_engine_goes_on(tiny: Path) -> None:
    with engine_of(tiny) as engine:
        with pytest.raises(TextError):
            said(engine.complete("").pieces())
        assert len(said(engine.complete("The", 3, GREEDY).pieces())) > 0


def test_the_largest_window_leaves_room_for_a_prompt_and_for_its_number(tiny: Path) -> None:
    with engine_of(tiny) as engine:
        engine.wait()
        one = engine.largest_window()
        assert one
        system = "Be brief, and kind to the man of the house."
        sessions = [engine.session(system, window=one) for _ in range(2)]
        for session in sessions:
            session.wait()
        ring = sessions[0].stats.cache_bytes
        for session in sessions:
            session.close(5)
        weights = engine.memory[0]
    with engine_of(tiny, memory_budget=weights + 2 * ring) as engine:
        engine.wait()
        assert engine.largest_window(2) == one and engine.largest_window(40) is None
