"""The desktop app without its window: send, stream, stop, reopen, and errors."""

import asyncio
from dataclasses import replace

from mlx_stream import Piece
from mlx_stream.chat import manage
from mlx_stream.recall.quote import Passage
from tests.fakes.desks import chat_of, on_a_loop, open_controller, until


@on_a_loop
async def test_a_reply_streams_piece_by_piece_and_is_saved(letters):
    async with open_controller(letters, window=200, max_tokens=20) as one:
        seen = []
        one._changed = lambda: seen.append(one.said[-1].reply if one.said else "")
        await one.send("  Hi there, you!  ")
        said = one.said
        assert [(s.question, s.finish) for s in said] == [("Hi there, you!", "length")]
        assert len(said[0].reply) == 20 and said[0].reply.isalpha()
        assert [t for t in dict.fromkeys(seen) if t] == [said[0].reply[: n + 1] for n in range(20)]
        assert one.status.idle and one.attended == 1
        assert one.gauge.capacity == 204 and 0 < one.gauge.attended < 204
        assert one.gauge.bytes == chat_of(one).stats.cache_bytes > 0
        assert one.name == "hi-there-you"
        assert [c.name for c in one.lists.conversations] == ["hi-there-you"]
        await one.send("Hi there, you!")
        assert len(one.said) == 2 and one.lists.conversations[0].exchanges == 2


@on_a_loop
async def test_stop_ends_a_reply_within_a_token_and_keeps_it(letters):
    async with open_controller(letters, window=200, max_tokens=600) as one:
        task = asyncio.create_task(one.send("Go on for ever."))
        await until(lambda: one.said and len(one.said[-1].reply) >= 5)
        one.stop()
        heard = len(one.said[-1].reply)
        await task
        assert one.status.idle and one.said[-1].finish == "interrupted"
        # One more piece may be ready, and another is computed while that one is shown.
        assert heard <= len(one.said[-1].reply) <= heard + 2
        kept = one.said[-1]
        assert [e.reply for e in chat_of(one).exchanges] == [kept.reply]
        await one.send("And now?")
        assert one.said[0] == kept and len(one.said[1].reply) == 600


@on_a_loop
async def test_evicted_tokens_and_exchanges_are_counted(letters):
    async with open_controller(letters, window=60, max_tokens=20) as one:
        for number in range(4):
            await one.send(f"Question {number}?")
        assert one.gauge.evicted > 0 and one.attended < 4 == len(one.said)
        assert one.attended == len(chat_of(one).exchanges)
        assert f"{one.gauge.evicted:,} evicted" in str(one.gauge)


@on_a_loop
async def test_a_saved_conversation_is_reopened_with_its_window_and_continues(letters):
    async with open_controller(letters, window=90) as one:
        await one.send("First?")
        before, gauge = [*one.said], one.gauge
        await one.begin()
        assert one.said == [] and one.name is None and one.gauge.capacity == 0
        await one.choose_window(120)
        await one.send("Another?")
        await one.open("first")
        assert one.said == before and one.window == 90 and one.attended == 1
        assert one.gauge == replace(gauge, tokens_per_second=0.0)
        await one.send("Second?")
        assert len(one.said) == 2 and one.said[:1] == before
    with manage.open_transcript("first") as store:
        assert [turn.exchange.question for turn in store.whole()[0]] == ["First?", "Second?"]


@on_a_loop
async def test_a_first_question_that_is_refused_leaves_no_conversation(letters):
    async with open_controller(letters, window=10**9) as one:
        await one.send("Hi")
        assert one.status.alarming and one.draft == "Hi" and one.said == [] and one.name is None
        await one.choose_window(100)
        await one.start()
        assert one.lists.conversations == []
        await one.send("Hi")
        assert [c.name for c in one.lists.conversations] == ["hi"] == [one.name]


@on_a_loop
async def test_a_conversation_continues_with_another_model(letters, tiny):
    async with open_controller(letters) as one:
        await one.send("Hi")
        await one.choose_model(str(tiny))
        assert one.status.idle and one.model == str(tiny) and one.attended == 1
        await one.send("More")
        assert [s.question for s in one.said] == ["Hi", "More"]
        header = one.lists.conversations[0].header
        assert header and header.model == str(tiny)


@on_a_loop
async def test_leaving_in_the_middle_of_a_reply_saves_it(letters):
    async with open_controller(letters, window=200, max_tokens=600) as one:
        task = asyncio.create_task(one.send("Go on."))
        await until(lambda: one.said and one.said[-1].reply)
    await task
    with manage.open_transcript("go-on") as store:
        (turn,), damage = store.whole()
    kept = turn.exchange
    assert kept.finish == "interrupted" and kept.reply and not damage


@on_a_loop
async def test_a_search_lists_the_conversations_that_have_a_word(letters):
    async with open_controller(letters, window=200, max_tokens=4) as one:
        await one.send("Where are zebras?")
        await one.begin()
        await one.send("Where are lions?")
        await one.lists.search(" zebra ")
        assert [c.name for c in one.lists.conversations] == ["where-are-zebras"]
        await one.lists.search("walrus")
        assert one.lists.conversations == []
        await one.lists.search("")
        assert len(one.lists.conversations) == 2


@on_a_loop
async def test_what_was_quoted_is_shown_with_the_reply(letters):
    async with open_controller(letters, window=200, max_tokens=4) as one:
        await one.send("Hello")
        passage = Passage(1, "2026-05-09T17:03:00Z", "a", "b")
        one._hear(Piece("", "length", recalled=(passage,)))
        one._settle(read=True)
        assert one.said[-1].recalled == (passage.line,) and len(one.said[-1].reply) == 4
