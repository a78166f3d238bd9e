"""What an app developer sees: one-line reprs, and replies that never end silently."""

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import mlx_stream
from tests.fakes.engines import DEADLINE, GREEDY, LONG, engine_of, said

PROGRAM = Path(__file__).parents[1] / "fakes" / "public_program.py"


def test_the_strictly_typed_program_uses_every_public_name_and_runs(letters, tmp_path):
    text = PROGRAM.read_text("utf-8")
    assert text.startswith("# pyright: strict\n")
    used = {*re.findall(r"mlx_stream\.(\w+)", text), "errors"}
    assert used == {*mlx_stream.__all__}
    command = [sys.executable, "-P", PROGRAM, letters]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE)
    assert found.returncode == 0, found.stderr
    assert "Session(" in found.stdout and (tmp_path / "stream.safetensors").exists()


def test_reprs_are_one_short_line(letters):
    model = mlx_stream.load(letters)
    chat = mlx_stream.ChatSession(model, sampling=GREEDY, window=200, max_tokens=300)
    assert "0 exchanges attended" in repr(chat)
    said(chat.reply("A line\nand another"))
    with engine_of(letters) as engine:
        session, listener = engine.session(), engine.listen()
        session.wait(DEADLINE)
        assert "ready" in repr(engine)
        things = [model, chat, chat.exchanges[0], chat.stats, engine, session, listener]
        things += [mlx_stream.Sampling(), next(chat.reply("B"))]
        for thing in things:
            line = repr(thing)
            assert "\n" not in line and "object at" not in line
            assert line.startswith(f"{type(thing).__name__}(") and len(line) < 800, line
        session.close()
        assert repr(session).startswith("Session(closed: ")
    assert ": closed, " in repr(engine)


def test_a_superseded_reply_ends_with_a_piece_that_says_so(letters):
    with engine_of(letters) as engine:
        chat = engine.session(sampling=GREEDY, window=400, max_tokens=10_000)
        first = chat.reply("One?")
        assert next(first).finish is None
        assert next(chat.reply("Two?")).text
        *_, last = first
        assert (last.text, last.finish) == ("", "superseded")
        *_, last = chat.reply("Three?", max_tokens=3)
        assert last.finish == "length"

        async def supersede():
            one = chat.areply("One?")
            await anext(one)
            chat.undo().result(DEADLINE)
            return [piece.finish async for piece in one]

        assert asyncio.run(supersede())[-1] == "superseded"
        listener = engine.listen(sampling=GREEDY, window=400, max_tokens=10_000)
        listener.feed(LONG, timeout=DEADLINE)
        answer = listener.ask("Why?")
        next(answer)
        next(listener.ask("And?"))
        *_, last = answer
        assert last.finish == "superseded"


def test_a_reply_that_ended_is_not_superseded_and_a_closed_one_says_nothing(letters):
    with engine_of(letters) as engine:
        chat = engine.session(sampling=GREEDY, window=400, max_tokens=3)
        first = chat.reply("One?")
        pieces = [next(first)]
        while pieces[-1].finish is None:
            pieces.append(next(first))
        said(chat.reply("Two?"))
        assert [*first] == [] and pieces[-1].finish == "length"
        second = chat.reply("Three?")
        next(second)
        second.close()
        assert [*second] == []
