"""Templates that rewrite turns: thinking that is dropped, and chains of tool calls."""

from dataclasses import replace

import pytest

import mlx_stream
from mlx_stream.chat.messages import Message
from mlx_stream.generate.token_stream import TokenStream
from mlx_stream.sampling import Sampling
from mlx_stream.server.lines import Lines
from tests.chat.test_settle import SCRIPT, THINKS
from tests.fakes.clients import SYSTEM, Client, attended_texts, ids_to_attend
from tests.fakes.conversations import assert_well_formed, said
from tests.fakes.engines import GREEDY, engine_of, eventually
from tests.fakes.thinkers import write_random, write_thinker
from tests.fakes.tool_models import MODELS, TOOLS, scripted

NO_GUESS = Sampling(temperature=0, seed=1)


@pytest.mark.parametrize("sent", [True, False], ids=["sent back", "left out"])
@pytest.mark.parametrize("name", THINKS)
def test_thinking_does_not_count(name, sent, tmp_path):
    path = write_thinker(tmp_path / "model", THINKS[name], SCRIPT, "<|im_end|>")
    model = mlx_stream.load(path, dtype="float32", keep_quantized=False)
    options = {"window": 200, "sampling": GREEDY, "max_tokens": 20, "speculate": False}
    twin = mlx_stream.ChatSession(model, SYSTEM.text, **options)
    with engine_of(path) as engine:
        client = Client(Lines(engine, window=200), max_tokens=20)

        def check(cache):
            thinking = "".join(piece.thinking for piece in client.pieces)
            assert (thinking, client.said) == ("abcdefghi", "jklmno")
            assert client.reply.cache == cache
            assert ids_to_attend(client.chat) == ids_to_attend(twin)
            assert_well_formed(client.chat)
            client.messages[-1] = replace(client.messages[-1], thinking=thinking if sent else "")

        for number, question in enumerate(["Hi", "And?", "More?", "Yes?", "Oh?", "So?", "Well?"]):
            client.ask(question)
            last = [*twin.reply(question)][-1]
            check("extended" if number else "new")
            asked = len(twin.exchanges[-1].question_ids)
            # What settles the previous reply is read after it, or else with this question.
            most = last.settled + asked + len(twin.exchanges[-1].closing_ids)
            assert asked <= client.reply.read <= most or not number
        reply = client.begin("Stop?")
        [next(reply) for _ in range(3)]
        reply.cancel()  # during its thinking, none of which is kept
        assert attended_texts(client.chat)[-1] == ("Stop?", "")
        assert_well_formed(client.chat)
        client.messages.append(Message("assistant", ""))
        client.ask("On?")
        assert client.reply.cache == "extended"
        assert_well_formed(client.chat)
        client.take_back(2)
        twin = client.chat.fork(2)
        client.ask("Else?")
        said(twin.reply("Else?", 20))
        assert client.reply.cache == "forked" and ids_to_attend(client.chat) == ids_to_attend(twin)
        del client.messages[-1]
        client.ask()
        said(twin.retry(20))
        check("retried")
        if name == "drops it late":  # the previous turn has its thinking again
            assert client.reply.read > 1
        else:
            assert client.reply.read == 1
        fresh = Client(Lines(engine, window=200), client.messages, max_tokens=20)
        fresh.ask("And now?")
        assert fresh.reply.cache == "cold"
        held = attended_texts(fresh.chat)
        assert held == fresh.texts[-len(held) :] and len(held) > 1
        assert_well_formed(fresh.chat)


def test_a_step_that_fails_behind_a_reply_closes_the_line(tmp_path, monkeypatch):
    path = write_thinker(tmp_path / "model", THINKS["thinks"], SCRIPT, "<|im_end|>")
    run, failed = TokenStream.run, []

    def fail(self, request):
        if request.settling and not failed:
            failed.append(request)
            self.fail()
            raise RuntimeError("out of memory")
        return run(self, request)

    monkeypatch.setattr(TokenStream, "run", fail)
    with engine_of(path) as engine:
        client = Client(Lines(engine, window=200), max_tokens=20)
        client.ask("Hi")
        eventually(lambda: failed and not client.lines.state())
        client.ask("And?")
        assert client.reply.cache == "cold" and client.said == "jklmno"
        assert attended_texts(client.chat) == client.texts


@pytest.mark.parametrize("name", MODELS)
def test_a_chain_of_calls_is_extended(name, tmp_path, monkeypatch):
    """The client changes the ids, and those parts of the arguments that do not count."""
    kind, script, run = MODELS[name], [], TokenStream.run
    monkeypatch.setattr(
        TokenStream,
        "run",
        lambda self, request: scripted(script, request, run(self, replace(request, more=False))),
    )
    path, *_ = write_random(tmp_path / "model", kind.source, kind.ends[1])
    calls = [("weather", {"of": "Rome", "in": [1, None]}), ("time", {"of": "Oslo"})][: kind.most]
    with engine_of(path) as engine:
        client = Client(
            Lines(engine, window=1_200),
            tools=TOOLS,
            sampling=NO_GUESS,
            max_tokens=200,
        )

        def ask(*question, written):
            engine.wait()
            script[:] = engine._host.model.tokenizer.encode(written, special=False)
            reply = client.ask(*question)
            assert not script and reply.line == 1
            assert_well_formed(client.chat)
            return reply

        ask("Hi", written=kind.written("Hm", "Hello."))
        asked: list[str | Message] = ["Where?"]
        for step in ("First", "Second"):
            reply = ask(*asked, written=kind.written(step, "", calls))
            assert reply.cache == "extended" and reply.finish == "end"
            assert [(call.name, dict(call.arguments)) for call in reply.calls] == calls
            assert all(call.id for call in reply.calls)
            changed = [
                replace(call, id=f"call_{at}", arguments=dict([*call.arguments.items()][::-1]))
                for at, call in enumerate(reply.calls)
            ]
            client.messages[-1] = replace(client.messages[-1], calls=tuple(changed))
            asked = [Message("tool", f"It is {c.name}", id=c.id) for c in reversed(changed)]
        reply = ask(*asked, written=kind.written("Last", "All done."))
        assert reply.cache == "extended" and not reply.calls and client.said == "All done."
        reply = ask("And?", written=kind.written("Hm", "So."))
        assert reply.cache == "extended"
        texts = [exchange.reply for exchange in client.chat.exchanges]
        assert texts == ["Hello.", "", "", "All done.", "So."]
        tools = [m for e in client.chat.exchanges for m in e.asked if m.role == "tool"]
        assert [m.name for m in tools] == [name for name, _ in calls] * 2
        # Read as text, the chain is the same.
        script[:] = engine._host.model.tokenizer.encode(kind.written("Hm", "New."), special=False)
        fresh = Client(Lines(engine, window=1_200), client.messages, **client.options)
        fresh.ask("More?")
        assert fresh.reply.cache == "cold" and len(fresh.chat.exchanges) == 6
        assert_well_formed(fresh.chat)
