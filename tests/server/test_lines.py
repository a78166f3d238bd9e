"""Each row of the mapping: what is read, and what is attended to."""

import asyncio
import threading
from dataclasses import replace
from datetime import datetime

import pytest

import mlx_stream
from mlx_stream import errors
from mlx_stream.chat.messages import Message
from mlx_stream.generate.token_stream import TokenStream
from mlx_stream.server.line_record import Record, find_longest
from mlx_stream.server.lines import Lines
from tests.fakes.clients import SYSTEM, Client, attended_texts, chat_of, ids_to_attend
from tests.fakes.conversations import assert_well_formed, said
from tests.fakes.engines import DEADLINE, GREEDY, LONG, engine_of, eventually, together
from tests.fakes.shell import SMALL, edit
from tests.fakes.tiny import CHAT_TEMPLATE, tiny_config, write_letters

WINDOW = 150


@pytest.fixture
def engine(letters):
    with engine_of(letters) as engine:
        yield engine
    assert engine.close(DEADLINE)


@pytest.fixture
def lines(engine):
    lines = Lines(engine, window=WINDOW)
    yield lines
    lines.close_all()


@pytest.fixture(scope="module")
def model(letters):
    return mlx_stream.load(letters, dtype="float32", keep_quantized=False)


def plain(model, **options):
    """Return a conversation that is asked only what the client asks."""
    options = {"window": WINDOW, "max_tokens": 8, "system": SYSTEM.text} | options
    return mlx_stream.ChatSession(model, sampling=GREEDY, speculate=False, **options)


def assert_same(client, twin, cache, read=None):
    """Check that the last reply is the twin's, read as many tokens, and left the same ids."""
    reply, pieces = client.reply, client.pieces
    assert (reply.cache, said(pieces)) == (cache, twin.exchanges[-1].reply)
    assert ids_to_attend(client.chat) == ids_to_attend(twin)
    assert_well_formed(client.chat)
    assert reply.read + reply.cached == reply.attended
    assert reply.evicted_turns == len(client.texts) - 1 - (len(twin.exchanges) - 1)
    assert reply.read == pieces[-1].read + pieces[-1].settled if read is None else read


def test_a_history_is_extended_as_a_conversation_is(lines, model):
    client, twin = Client(lines), plain(model)
    for number, question in enumerate(["Hi", "And?", "More?", "Yes?", "Hm", "Oh", "Well?"], 1):
        client.ask(question)
        last = [*twin.reply(question)][-1]
        assert_same(client, twin, "extended" if number > 1 else "new", last.read)
        assert client.reply.read == last.read and client.reply.finish == last.finish
        assert client.reply.evicted_tokens == twin.cache.evicted
    assert client.reply.evicted_turns > 1 and len(lines.state()) == 1
    assert client.reply.window == WINDOW


def test_a_question_asked_again_is_answered_again(lines, model):
    client, twin = Client(lines), plain(model)
    for question in ("Hi", "And?", "More?"):
        client.ask(question)
        said(twin.reply(question))
    for _ in range(2):
        del client.messages[-1]
        client.ask(max_tokens=5)
        said(twin.retry(5))
        assert_same(client, twin, "retried", 1)
        assert client.reply.read == 1 == client.pieces[-1].read
    client.ask("So?")
    said(twin.reply("So?"))
    assert_same(client, twin, "extended")
    assert len(lines.state()) == 1


def test_the_first_question_asked_again_is_new(lines, model):
    client, twin = Client(lines), plain(model)
    client.ask("Hi")
    client.take_back(1)
    client.ask("Hi")
    said(twin.reply("Hi"))
    assert_same(client, twin, "new")
    assert client.reply.line == 2


@pytest.mark.parametrize("streams", [1, 4])
def test_another_last_question_takes_the_turn_back_in_a_copy(engine, model, streams):
    lines = Lines(engine, streams, window=WINDOW)
    client, twin = Client(lines), plain(model)
    for question in ("Hi", "And?", "More?"):
        client.ask(question)
        said(twin.reply(question))
    other = twin.fork(1)
    client.take_back(1)
    client.ask("Else?")
    last = [*other.reply("Else?")][-1]
    assert_same(client, other, "edited", last.read)
    assert client.reply.read == last.read
    states = {state.id: state for state in lines.state()}
    assert len(states) == min(streams, 2)
    if streams > 1:  # the original is as it was
        assert ids_to_attend(chat_of(lines, 1)) == ids_to_attend(twin)
        assert next(line for line in lines._lines if line.spare).id == 1
    lines.close_all()


@pytest.mark.parametrize("streams", [1, 2])
def test_an_earlier_turn_is_reached_in_a_copy(engine, model, streams):
    lines = Lines(engine, streams, window=WINDOW)
    client, twin = Client(lines), plain(model)
    for question in ("Hi", "And?", "More?", "Yes?"):
        client.ask(question)
        said(twin.reply(question))
    client.take_back(2)
    client.ask("Else?")
    other = twin.fork(2)
    last = [*other.reply("Else?")][-1]
    assert_same(client, other, "forked", last.read)
    assert client.reply.read == last.read
    if streams > 1:
        assert ids_to_attend(chat_of(lines, 1)) == ids_to_attend(twin)
    lines.close_all()


def test_turns_that_the_line_has_not_read_are_read_as_text(lines, model):
    client, twin = Client(lines), plain(model)
    for question in ("Hi", "And?", "More?"):
        client.ask(question)
        said(twin.reply(question))
    client.take_back(1)
    client.messages += [Message("user", "Who?"), Message("assistant", "the man")]
    client.ask("Else?")
    other = twin.fork(1)
    other.follow(client.messages[-4:-2])
    last = [*other.reply("Else?")][-1]
    assert_same(client, other, "forked", last.read + last.settled)
    assert client.reply.read == last.read + last.settled < client.reply.attended
    assert attended_texts(client.chat) == client.texts
    assert ids_to_attend(chat_of(lines, 1)) == ids_to_attend(twin)


def test_turns_that_fill_the_window_are_read_without_those_before(lines, model):
    client = Client(lines)
    client.ask("Hi")
    for number in range(9):
        client.messages += [Message("user", f"Who {number}?"), Message("assistant", "the man")]
    client.ask("Else?")
    assert client.reply.cache == "cold" and client.reply.read < WINDOW + 30
    texts = attended_texts(client.chat)
    assert texts == client.texts[-len(texts) :] and client.reply.evicted_turns == 11 - len(texts)
    assert_well_formed(client.chat)
    client.ask("And?")
    assert client.reply.cache == "extended"


def test_what_a_client_leaves_out_leaves(lines, model):
    client, twin = Client(lines), plain(model)
    for number in range(8):
        client.ask(f"Question {number}?")
        said(twin.reply(f"Question {number}?"))
        client.trim(max(0, len(client.texts) - 2))
        twin.clear(number)
        assert attended_texts(client.chat)[-2:] == client.texts
        if number > 2:
            assert client.reply.cache == "shifted"
            assert client.reply.read <= len(twin.exchanges[-1].question_ids) + 8
            held = attended_texts(client.chat)
            assert held == [*client.texts][-3:] or len(held) == 3
            assert_well_formed(client.chat)
            assert client.reply.evicted_turns == 0
    # When the next reply begins, the stream already attends to exactly what the client sent.
    client.begin("And?").start()
    chat = client.lines._lines[0].session._session_worker.chat
    said(client.reply)
    assert client.chat is chat and len(client.chat.exchanges) == 3
    assert len(lines.state()) == 1


def test_a_trimmed_history_can_be_retried_and_edited(lines, model):
    client, twin = Client(lines), plain(model)
    for question in ("Hi", "And?", "More?", "Yes?"):
        client.ask(question)
        said(twin.reply(question))
    client.trim(2)
    del client.messages[-1]
    client.ask(max_tokens=3)
    twin.clear(3)
    said(twin.retry(3))
    assert_same(client, twin, "shifted")
    assert client.reply.read == 1
    for question in ("So?", "Then?"):
        client.ask(question)
        said(twin.reply(question))
    client.trim(1)
    client.take_back(1)
    client.ask("Else?")
    other = twin.fork(1)
    other.clear(4)
    said(other.reply("Else?"))
    assert_same(client, other, "shifted")
    assert ids_to_attend(chat_of(lines, 1)) == ids_to_attend(twin)


def test_an_unknown_history_is_read_from_its_newest_turns(lines, model):
    history = [SYSTEM]
    for number in range(20):
        history += [Message("user", f"Question {number}?"), Message("assistant", "the man")]
    client = Client(lines, history)
    client.ask("And?")
    texts = attended_texts(client.chat)
    assert client.reply.cache == "cold" and texts == client.texts[-len(texts) :]
    assert 2 < len(texts) < 10 and client.reply.evicted_turns == 21 - len(texts)
    assert client.reply.read == client.reply.attended <= WINDOW + client.chat.stats.pinned
    assert_well_formed(client.chat)
    client.ask("Go on")
    assert client.reply.cache == "extended"
    twin = plain(model, history=history[-2 * (len(texts) - 1) :])
    said(twin.reply("And?"))
    said(twin.reply("Go on"))
    assert client.said == twin.exchanges[-1].reply


@pytest.mark.parametrize("place", [2, 4])
def test_a_turn_that_is_too_long_is_not_read_nor_are_those_before(lines, place):
    history = [SYSTEM]
    for number in range(5):
        history += [Message("user", f"Question {number}?"), Message("assistant", "the man")]
    history[1 + 2 * place] = Message("user", "word " * 60_000)
    client = Client(lines, history)
    client.ask("And?")
    assert client.reply.cache == "cold" and client.reply.evicted_turns == place + 1
    assert attended_texts(client.chat) == client.texts[place + 1 :]
    assert_well_formed(client.chat)
    client.ask("Go on")
    assert client.reply.cache == "extended"
    client.ask("So?")
    client.messages[-2:-2] = history[:0:-1][::-1]  # the whole earlier history occurs again
    client.ask("Then?")
    assert client.reply.cache == "cold" and client.reply.evicted_turns > place


def test_another_head_is_another_conversation(lines):
    client = Client(lines)
    client.ask("Hi")
    client.messages[0] = replace(SYSTEM, text="Be long.")
    client.ask("And?")
    assert (client.reply.cache, client.reply.reason) == ("cold", "no stream has the same head")
    client.messages[0] = SYSTEM
    client.ask("More?")
    assert client.reply.cache == "forked"


@pytest.mark.parametrize("dated", [True, False])
def test_the_day_belongs_to_the_head_of_a_template_that_names_it(tmp_path, monkeypatch, dated):
    folder = write_letters(tmp_path / "letters", tiny_config(**SMALL))
    if dated:
        source = "{% set day = strftime_now('%d %B') %}" + CHAT_TEMPLATE.replace(
            "message['content']", "(day if loop.first else '') + message['content']", 1
        )
        edit(folder / "tokenizer_config.json", chat_template=source)
    days = [datetime(2026, 12, 1, 23, 59), datetime(2026, 12, 2), datetime(2026, 12, 2, 9)]

    class Clock:
        @staticmethod
        def now():
            return days[0]

    monkeypatch.setattr("mlx_stream.server.lines.datetime", Clock)
    with engine_of(folder) as engine:
        engine.wait()
        client, caches = Client(Lines(engine, window=WINDOW)), []
        for question in ("Hi", "And?", "More?"):
            client.ask(question)
            caches.append(client.reply.cache)
            head = engine._host.model.tokenizer.decode(client.chat.prompts.pinned)
            assert (days[0].strftime("%d %B") in head) == dated
            days.pop(0)
    assert caches == ["new", "cold" if dated else "extended", "extended"]


def test_an_empty_history_takes_over_no_conversation(lines):
    client, task = Client(lines), Client(lines)
    client.ask("Hi")
    client.ask("And?")
    task.ask("Write a title.")
    assert task.reply.cache == "new" and task.reply.line == 2
    client.ask("More?")
    assert client.reply.cache == "extended" and client.reply.line == 1


def test_replies_are_compared_in_one_form(lines):
    client = Client(lines)
    client.ask("Hi")
    client.messages[-1] = replace(client.messages[-1], text=f"\n {client.said} ", thinking="Hm")
    client.ask("And?")
    assert client.reply.cache == "extended"
    client.messages[-1] = replace(client.messages[-1], text=client.said + "!")
    client.ask("More?")
    assert client.reply.cache == "forked"


def test_a_busy_line_is_neither_waited_for_nor_shared(lines):
    client = Client(lines)
    client.ask("Hi")
    other = Client(lines, client.messages)
    reply = client.begin("Long?", max_tokens=40)
    next(reply)
    other.ask("And?")
    assert other.reply.cache == "cold" and other.reply.line == 2
    assert "writing" in other.reply.reason
    client.pieces = [*reply]
    assert reply.finish == "length"


def test_more_clients_than_streams(engine):
    idle = threading.Event()
    lines = Lines(engine, 2, window=WINDOW, on_idle=idle.set)
    clients = [Client(lines) for _ in range(3)]
    replies = [client.begin(f"Hi {n}", max_tokens=90) for n, client in enumerate(clients[:2])]
    with pytest.raises(errors.QueueFull, match="all 2 streams"):
        clients[2].begin("Hi")
    assert not idle.is_set()
    said(replies[0])
    assert idle.wait(DEADLINE)
    del clients[2].messages[-1]
    clients[2].ask("Hi")
    assert clients[2].reply.line == 3 and len(lines.state()) == 2
    replies[1].cancel()
    lines.close_all()
    with pytest.raises(errors.EngineClosed):
        clients[2].begin("Hi")


def test_the_lines_of_one_turn_go_first(engine):
    lines = Lines(engine, 3, window=WINDOW)
    chats = [Client(lines) for _ in range(2)]
    for client in chats:
        client.ask("Hi")
        client.ask("And?")
    for task in ("Title?", "Tags?", "Follow-ups?"):
        Client(lines).ask(task)
    for client in chats:
        client.ask("More?")
        assert client.reply.cache == "extended"
    chats[0].take_back(1)
    for line in lines.state():
        if line.id not in (1, 2):
            lines.close(line.id)
    chats[0].ask("Else?")  # in a copy: the original is closed first, although used last
    assert chats[0].reply.cache == "edited"
    Client(lines).ask("Title?")
    assert {state.id for state in lines.state()} >= {2, chats[0].reply.line}
    lines.close_all()


def test_a_line_that_has_lost_too_much_is_not_used(lines):
    client = Client(lines)
    for number in range(12):
        client.ask(f"Question {number}?")
    assert client.reply.evicted_turns > 6
    client.take_back(client.chat.number - 8)  # one of these turns may still be attended
    client.ask("Else?")
    assert client.reply.cache == "cold" and "been evicted" in client.reply.reason
    texts = attended_texts(client.chat)
    assert texts == client.texts[-len(texts) :] and len(texts) > 2


def test_a_reply_that_is_cut_short_is_what_was_taken(lines, model):
    client, twin = Client(lines), plain(model)
    client.ask("Hi")
    said(twin.reply("Hi"))
    reply = client.begin("Long?", max_tokens=100)
    taken = [next(reply) for _ in range(3)]
    reply.cancel()
    assert [*reply] == [] and reply.finish == "cancelled"
    assert attended_texts(client.chat)[-1] == ("Long?", said(taken))
    assert_well_formed(client.chat)
    client.messages.append(Message("assistant", said(taken)))
    client.ask("And?")
    assert client.reply.cache == "extended" and client.reply.line == 1
    assert attended_texts(client.chat) == client.texts


def test_a_forgotten_reply_ends(lines):
    client = Client(lines)
    next(client.begin("Hi", max_tokens=100))
    client.reply = None
    eventually(lambda: lines.state()[0].state == "idle")


def test_a_reply_that_is_cancelled_before_it_begins_changes_nothing(lines):
    client = Client(lines)
    client.ask("Hi")
    before, texts = ids_to_attend(client.chat), client.texts
    with lines.engine._worker.lock:  # the engine cannot begin anything
        client.begin("And?").cancel()
        client.messages.pop()
        other = Client(lines)
        other.begin("And?").cancel()
    eventually(lambda: [state.state for state in lines.state()] == ["idle"])
    assert ids_to_attend(chat_of(lines, 1)) == before and client.texts == texts
    assert [*other.reply] == [] and other.reply.finish == "cancelled"
    client.ask("More?")
    assert client.reply.cache == "extended" and client.reply.line == 1
    client.take_back(1)
    with lines.engine._worker.lock:
        client.begin("Else?").cancel()
        assert lines._lines[0].copies and client.reply.cache == "edited"
    eventually(lambda: [state.id for state in lines.state()] == [1])
    assert not lines._lines[0].copies


def test_replies_with_asyncio(lines):
    client, told = Client(lines), []

    async def ask():
        reply = client.begin(LONG, progress=lambda *counts: told.append(counts))
        assert await reply.start_async() is reply and reply.attended and not told
        first = [piece async for piece in reply]
        client.messages.append(Message("assistant", said(first)))
        task = asyncio.ensure_future(wait(client.begin("Long?", max_tokens=10**9)))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return first

    async def wait(reply):
        async for _ in reply:
            pass

    pieces = asyncio.run(ask())
    assert pieces[-1].finish == "length" and told[-1] == (told[-1][1],) * 2
    eventually(lambda: lines.state()[0].state == "idle")


def test_wrong_requests_are_refused_before_anything_is_given(lines):
    client = Client(lines)
    client.ask("Hi")
    before = ids_to_attend(client.chat)
    for options, what in (({"bias": {10**9: 1.0}}, "bias"), ({"max_tokens": 0}, "max_tokens")):
        with pytest.raises(errors.ValueRefused, match=what):
            client.begin("And?", **options).start()
        client.messages.pop()
    assert ids_to_attend(client.chat) == before
    client.ask("And?")
    assert client.reply.cache == "extended"
    long = Client(lines, [replace(SYSTEM, text="word " * 3_000)])
    with pytest.raises(errors.ValueRefused, match="tokens"):
        long.begin("Hi").start()
    eventually(lambda: len(lines.state()) == 1)


def test_memory_that_does_not_suffice_is_taken_from_idle_lines(letters):
    with engine_of(letters) as first:
        client = Client(Lines(first, window=WINDOW))
        client.ask("Hi")
        budget = first.memory[0] + 2 * client.chat.stats.cache_bytes
    with engine_of(letters, memory_budget=budget) as engine:
        lines = Lines(engine, 9, window=WINDOW)
        clients = [Client(lines) for _ in range(6)]
        for number, client in enumerate(clients):
            client.ask(f"Hi {number}")
        assert 1 < len(lines.state()) < 4 and client.reply.cache == "new"
        client.ask("And?")
        client.take_back(1)
        client.ask("Else?")
        assert client.reply.cache == "edited" and attended_texts(client.chat) == client.texts
        replies = [
            client.begin("Long?", max_tokens=100) for client in (*clients[5:], *clients[3:4])
        ]
        for reply in replies:
            next(reply)
        last = Client(lines).begin("Hi")
        with pytest.raises(errors.MemoryRefused):
            [Client(lines).begin("Hi").start() for _ in range(3)]
        del last
        for reply in replies:
            reply.cancel()


def test_a_failed_step_closes_the_line_and_no_other(lines, monkeypatch):
    client = Client(lines)
    client.ask("Hi")
    run = TokenStream.run

    def fail(self, request):
        monkeypatch.setattr(TokenStream, "run", run)
        self.fail()
        raise RuntimeError("out of memory")

    monkeypatch.setattr(TokenStream, "run", fail)
    with pytest.raises(errors.ComputeError):
        client.ask("And?")
    eventually(lambda: lines.state() == [])
    client.ask()
    assert client.reply.cache == "cold" and attended_texts(client.chat) == client.texts


def test_lines_are_used_from_many_threads(engine):
    lines = Lines(engine, 3, window=WINDOW, shared=True)

    def talk(number):
        client = Client(lines)
        for turn in range(6):
            client.ask(f"Question {number}.{turn}?")

    together(*(lambda n=n: talk(n) for n in range(3)))
    states = lines.state()
    assert [state.state for state in states] == ["idle"] * 3
    assert sorted(state.turns for state in states) == [6, 6, 6]
    lines.close_all()


def test_a_question_may_begin_its_reply(lines):
    client = Client(lines)
    client.ask("Hi")
    begin = Message("assistant", "Certainly:")
    reply = client.begin("And?", begin)
    text = said(reply)
    client.messages[-1] = replace(begin, text=begin.text + text)
    assert attended_texts(client.chat) == client.texts
    reply = client.begin("So?", begin, max_tokens=10**6)
    taken = [next(reply) for _ in range(3)]
    reply.cancel()
    client.messages[-1] = replace(begin, text=begin.text + said(taken))
    assert attended_texts(client.chat) == client.texts
    client.ask("More?")
    assert client.reply.cache == "extended"


@pytest.mark.parametrize(
    ("wanted", "turns", "found"),
    [
        ("ABC", "ABABD", (2, 4)),
        ("AB", "ABCABC", (3, 5)),
        ("AAB", "AAAAC", (2, 4)),
        ("ABABC", "ABABABC", (2, 7)),
        ("X", "ABC", (0, 0)),
        ("AA", "AAA", (1, 3)),
    ],
)
def test_the_longest_beginning_is_found(wanted, turns, found):
    assert find_longest([*wanted], [*turns]) == found


def test_a_record_is_small():
    record, turn = Record(), bytes(64)
    for _ in range(5_000):
        record.add(turn)
        record.set_attended([7])
    assert record.nbytes <= 100 * 5_000
    record.truncate(10)
    assert (len(record), record.attended, len(record.digests)) == (10, 0, 640)
