"""Several clients at once, against plain lists of what must be attended."""

from typing import ClassVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from mlx_stream.chat.history import exchanges_of, newest_turns
from mlx_stream.chat.messages import Message
from mlx_stream.engine import Engine
from mlx_stream.errors import QueueFull
from mlx_stream.server.conversation import TURN_BYTES
from mlx_stream.server.lines import Lines
from tests.fakes.clients import Client, attended_texts, chat_of, ids_to_attend
from tests.fakes.conversations import assert_well_formed, said
from tests.fakes.engines import engine_of

WINDOW, STREAMS = 140, 3
MAX_TOKENS = 6
QUESTIONS = ("Hi", "And then?", "Why äöü €?", "Tell me of the house and the man. " * 2)
IN_PLACE = ("extended", "retried")
numbers = st.integers(0, 2)
questions = st.sampled_from(QUESTIONS)


class Clients(RuleBasedStateMachine):
    """Three clients, and more streams than one of them needs."""

    engine: ClassVar[Engine]

    def __init__(self):
        super().__init__()
        self.lines = Lines(self.engine, STREAMS, window=WINDOW)
        self.clients = [self.new_client() for _ in range(3)]
        self.busy = []  # replies in progress, with their clients and the pieces taken

    def new_client(self):
        return Client(self.lines, max_tokens=MAX_TOKENS)

    @initialize(question=questions)
    def same_first_turns(self, question):
        for number in range(2):
            self.ask(number, question)

    def ids_of_idle_lines(self):
        idle = [state.id for state in self.lines.state() if state.state == "idle"]
        return {number: ids_to_attend(chat_of(self.lines, number)) for number in idle}

    def ask(self, number, *question):
        client = self.clients[number]
        if self.busy:  # nothing can be compared while something is computed
            count = len(client.messages)
            try:
                client.ask(*question)
            except QueueFull:
                del client.messages[count:]
                assert len(self.busy) == STREAMS
            else:
                assert client.reply.line not in [reply.line for _, reply, _ in self.busy]
            return
        before = self.ids_of_idle_lines()
        client.ask(*question)
        self.check(client, before)

    def check(self, client, before):
        """Check the last reply of a client, while nothing else is computed."""
        reply, chat = client.reply, client.chat
        texts, held = client.texts, attended_texts(chat)
        assert held == texts[-len(held) :]
        assert_well_formed(chat)
        assert reply.evicted_turns == len(texts) - len(held)
        assert reply.read + reply.cached == reply.attended <= WINDOW + reply_sinks(chat)
        # A reply that was read as text is read with what closes it.
        asked = len(chat.exchanges[-1].question_ids + chat.exchanges[-1].closing_ids) + 8
        if reply.cache == "retried":
            assert reply.read == 1
        elif len(texts) > 1 and reply.cache in ("extended", "edited", "shifted"):
            assert reply.read <= asked
        if len(texts) > 1:  # at least half of what would be attended if all were read
            exchanges = exchanges_of(client.messages[1:-2])
            newest = newest_turns(chat.prompts, exchanges, WINDOW)
            cold = sum(len(turn.exchange.ids) for turn in newest)
            assert 2 * (reply.attended + asked + MAX_TOKENS + 60) >= cold
        else:
            assert reply.cache == "new"
        after = self.ids_of_idle_lines()
        kept = [n for n in after if n in before and n != reply.line]
        assert all(after[n] == before[n] for n in kept) and reply.line in after
        if reply.line in before:
            assert reply.cache in IN_PLACE or len(before) == STREAMS or reply.cache == "shifted"

    @invariant()
    def records_are_what_the_lines_attend_to(self):
        if self.busy:
            return
        for line in self.lines._lines:
            exchanges = chat_of(self.lines, line.id).exchanges
            turns = [(*e.asked, Message("assistant", e.reply)) for e in exchanges]
            digests = self.lines._digests.of_turns(turns)
            record = line.record
            assert bytes(record.digests[(len(record) - len(turns)) * TURN_BYTES :]) == digests
            assert record.attended == len(turns) and line.reply is None

    @rule(number=numbers, question=questions)
    def extend(self, number, question):
        self.ask(number, question)

    @rule(number=numbers)
    def retry(self, number):
        if self.clients[number].texts:
            del self.clients[number].messages[-1]
            self.ask(number)

    @rule(number=numbers, question=questions, back=st.integers(1, 3))
    def branch(self, number, question, back):
        client = self.clients[number]
        client.take_back(min(back, len(client.texts)))
        self.ask(number, question)

    @rule(number=numbers, question=questions, count=st.integers(1, 3))
    def trim(self, number, question, count):
        client = self.clients[number]
        client.trim(min(count, len(client.texts)))
        self.ask(number, question)

    @rule(number=numbers, question=questions)
    def begin_with_nothing(self, number, question):
        self.clients[number] = self.new_client()
        self.ask(number, question)

    @rule(number=numbers, question=questions, count=st.integers(1, 9))
    def add_turns_of_others(self, number, question, count):
        added = [Message("user", "Who?"), Message("assistant", "the man of the house")]
        self.clients[number].messages += added * count
        self.ask(number, question)

    @rule(number=numbers, other=numbers, question=questions)
    def continue_as_another(self, number, other, question):
        self.clients[number].messages = [*self.clients[other].messages]
        self.ask(number, question)

    @precondition(lambda self: len(self.busy) < 2)
    @rule(number=numbers, question=questions)
    def begin_a_long_reply(self, number, question):
        """Start a client's long reply, and let a new client continue from its history."""
        client, self.clients[number] = self.clients[number], self.new_client()
        self.clients[number].messages = [*client.messages]
        reply = client.begin(question, max_tokens=40)
        self.busy.append((client, reply, [next(reply)]))

    @precondition(lambda self: self.busy)
    @rule(cancel=st.booleans(), number=numbers)
    def end_a_long_reply(self, cancel, number):
        client, reply, taken = self.busy.pop(0)
        if cancel:
            reply.cancel()
        client.pieces = [*taken, *reply]
        assert reply.finish == ("cancelled" if cancel else "length")
        client.messages.append(Message("assistant", said(client.pieces)))
        if not self.busy and any(state.id == reply.line for state in self.lines.state()):
            assert attended_texts(client.chat)[-1:] == client.texts[-1:]
        self.clients[number] = client

    def teardown(self):
        for _, reply, _ in self.busy:
            reply.cancel()
        self.lines.close_all()


def reply_sinks(chat):
    return chat.cache.geometry.sinks


def test_clients_get_what_they_sent(letters):
    with engine_of(letters) as Clients.engine:
        run_state_machine_as_test(Clients, settings=settings(max_examples=20))
