"""Conversations on a tiny model: the stream holds what the template renders, whatever happens."""

import itertools
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlx_stream
from mlx_stream import backend
from mlx_stream.chat.exchange import unread_ids
from mlx_stream.chat.session import ChatSession
from mlx_stream.errors import TemplateError, TextError, ValueRefused
from mlx_stream.generate.token_stream import TokenStream
from mlx_stream.sampling import Sampling
from tests.fakes.tiny import tiny_config, tiny_weights, write_tiny

QUESTIONS = ("Hello there.", "And then?\nTell me.", "Why äöü €?", "Go on")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = tiny_config()
    folder = write_tiny(tmp_path_factory.mktemp("model"), config, tiny_weights(config))
    return mlx_stream.load(folder, dtype="float32", keep_quantized=False)


class History:
    """Every id a stream holds, evicted or not."""

    def __init__(self):
        self.ids = []

    def read(self, ids):
        self.ids.extend(ids)

    def rewind(self, count):
        del self.ids[len(self.ids) - count :]

    def restart(self, ids):
        raise AssertionError("it is another stream")

    def erase(self):
        pass


def session(model, **options) -> Any:
    """Return a `ChatSession` observed by a `History`; test_eviction.py has whole turns."""
    options.setdefault("evict", "token")
    options.setdefault("sampling", Sampling(1.0, top_p=1.0, seed=3))
    chat = ChatSession(model, **options)
    chat.tokens.ids.observers = [*chat.tokens.ids.observers, History()]
    return chat


def all_ids(chat):
    """Return every id that a stream holds, evicted or not."""
    chat.tokens.ids.record()
    history = chat.tokens.ids.observers[-1].ids
    assert len(history) == chat.tokens.length
    return [*history]


def held_text(chat):
    """Return the text of the stream, and of what it will read before the next turn."""
    assert chat.exchanges
    turns, pinned = chat.evictor.state.turns, chat.prompts.pinned
    ids = [*all_ids(chat), *unread_ids(pinned, turns, chat.tokens.length)]
    text = chat.model.tokenizer._backend.decode(ids, skip_special_tokens=False)
    return text + chat.prompts.rest_of(turns[-1].exchange) + chat.template.closing


def rendered(chat, turns):
    messages = [{"role": "system", "content": chat.system}] if chat.system else []
    for question, reply in turns:
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": reply},
        ]
    return chat.template.render(messages, reply=False)


def close_after(count):
    def talk(chat, question):
        pieces = chat.reply(question)
        text = "".join(piece.text for piece in itertools.islice(pieces, count))
        pieces.close()
        return text

    return talk


def to_the_end(chat, question, **options):
    return "".join(piece.text for piece in chat.reply(question, **options))


def interrupted(chat, question):
    pieces = chat.reply(question)
    text = next(pieces).text + next(pieces).text
    with pytest.raises(KeyboardInterrupt):
        pieces.throw(KeyboardInterrupt)
    return text


def interrupted_while_reading(chat, question):
    def progress(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(chat.reply(question, progress=progress))
    return ""


ENDINGS = {
    "limit": lambda chat, question: to_the_end(chat, question, max_tokens=9),
    "one": lambda chat, question: to_the_end(chat, question, max_tokens=1),
    "stop": lambda chat, question: to_the_end(chat, question, max_tokens=60, stop=["a", "e", "o"]),
    "end": lambda chat, question: to_the_end(chat, question, max_tokens=4000),
    "closed": close_after(4),
    "closed at once": close_after(1),
    "interrupted": interrupted,
    "interrupted while reading": interrupted_while_reading,
}


@pytest.mark.parametrize("system", [None, "You are brief."])
@pytest.mark.parametrize("ending", ENDINGS)
def test_the_stream_holds_what_the_template_renders(model, ending, system):
    """Sampled ids past what was handed out count as said only if the text handed out has them."""
    chat = session(model, system=system, window=400)
    turns = []
    for question in QUESTIONS:
        said = ENDINGS[ending](chat, question)
        text = held_text(chat)
        # Text held back when a reply is abandoned (a begun character or stop string) stays said.
        replies = text.rsplit("<|im_start|>assistant\n", 1)[1].removesuffix("<|im_end|>\n")
        assert replies.startswith(said)
        if not ending.startswith(("closed", "interrupted")):
            assert replies == said
        turns.append((question, replies))
        assert text == rendered(chat, turns)


def test_endings_mixed_in_a_small_window_still_render_whole(model):
    chat = session(model, window=60, system="Be brief.")
    turns = []
    for question, ending in zip(QUESTIONS * 4, itertools.cycle(ENDINGS), strict=False):
        if ending == "end":
            continue
        ENDINGS[ending](chat, question)
        text = held_text(chat)
        reply = text.rsplit("<|im_start|>assistant\n", 1)[1].removesuffix("<|im_end|>\n")
        turns.append((question, reply))
        assert text == rendered(chat, turns)
    assert chat.stats.evicted > 0


def test_a_stream_after_stops_and_rewinds_is_one_that_read_the_same_ids(model):
    chat = session(model, window=400)
    for question in QUESTIONS:
        ENDINGS["stop"](chat, question)
    fresh = TokenStream(model, model.new_cache(window=400))
    probe = [5, 6, 7]
    expected = fresh.read([*all_ids(chat), *probe])
    found = chat.tokens.read(probe)
    assert np.allclose(np.array(found), np.array(expected), atol=1e-4)


def test_a_reply_is_closed_by_the_next_one(model):
    chat = session(model, window=400)
    first = chat.reply("One?")
    unused = [next(first), next(first)]
    never = chat.reply("Never asked for")
    second = to_the_end(chat, "Two?", max_tokens=5)
    assert list(first) == []
    never.close()
    text = held_text(chat)
    replies = [part.split("<|im_end|>")[0] for part in text.split("<|im_start|>assistant\n")[1:]]
    assert len(replies) == 2 and replies[1] == second
    assert replies[0].startswith("".join(piece.text for piece in unused))
    assert text == rendered(chat, [("One?", replies[0]), ("Two?", second)])


def test_each_turn_reads_only_its_own_tokens(model):
    chat = session(model, system="Once.", window=400)
    to_the_end(chat, "One?", max_tokens=5)
    before = chat.tokens.length
    to_the_end(chat, "Two?", max_tokens=5)
    added = "".join([chat.template.closing, chat.template.turn("Two?", "Once."), "x" * 8])
    assert chat.tokens.length - before <= len(added)
    assert "Once." not in chat.model.tokenizer.decode(all_ids(chat)[before:])


def test_pieces_join_to_whole_characters_and_stats_add_up(model):
    chat = session(model, window=400)
    pieces = list(chat.reply("Hi", max_tokens=50))
    assert pieces[-1].finish in ("end", "length") and all(p.finish is None for p in pieces[:-1])
    "".join(piece.text for piece in pieces).encode()
    stats = chat.stats
    assert stats.reply_tokens <= 50 and stats.prompt_tokens > 0
    assert stats.attended == chat.cache.attended and stats.seed == 3
    assert stats.cache_bytes == chat.cache.nbytes and stats.window == 400


def test_a_turn_longer_than_the_window_is_read_in_full_and_said(model):
    notices = []
    chat = session(model, window=40, notify=notices.append)
    to_the_end(chat, "word " * 60, max_tokens=3)
    assert len(notices) == 2 and "longer than the window of 40" in notices[0]
    assert "begun to leave" in notices[1]
    assert chat.stats.notices == notices and chat.stats.evicted > 100
    to_the_end(chat, "S.", max_tokens=3)
    assert len(notices) == 2


def test_the_same_seed_says_the_same(model):
    texts = [
        [to_the_end(chat, question, max_tokens=12) for question in QUESTIONS]
        for chat in (session(model, window=50) for _ in range(2))
    ]
    assert texts[0] == texts[1]


def test_bad_questions_and_numbers_are_refused_and_change_nothing(model):
    chat = session(model)
    for wrong, error in ((("",), TextError), (("x", 0), ValueRefused)):
        with pytest.raises(error):
            next(chat.reply(*wrong))
    assert chat.tokens.length == 0
    to_the_end(chat, "Now?", max_tokens=2)
    with pytest.raises(ValueRefused, match="max-tokens"):
        ChatSession(model, max_tokens=0)


def test_a_model_without_template_or_with_one_that_rewrites_cannot_chat(tmp_path):
    config = tiny_config()
    folder = write_tiny(tmp_path / "plain", config, tiny_weights(config))
    for template, reason in ((None, "no chat template"), ("{{ messages|length }}", "template")):
        set_template(folder, template)
        with pytest.raises(TemplateError, match=reason):
            ChatSession(mlx_stream.load(folder))


def set_template(folder, template):
    import json

    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("chat_template", None)
    if template is not None:
        config["chat_template"] = template
    path.write_text(json.dumps(config))


def test_a_template_that_trims_replies_gets_its_trailing_whitespace_taken_back(
    tmp_path, monkeypatch
):
    monkeypatch.setenv(backend.COMPILE, "0")  # a trace would not see what changes from step to step
    config = tiny_config()
    folder = write_tiny(tmp_path / "trims", config, tiny_weights(config))
    set_template(
        folder,
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    )
    chat = session(mlx_stream.load(folder, dtype="float32"), window=400)
    assert chat.template.trims
    logits = chat.tokens.network.logits
    space = chat.model.tokenizer.encode("a \n", special=False)

    step = itertools.count()

    def whitespace(hidden):
        # "a", then whitespace: what this model would hardly say by itself.
        bias = mx.zeros(logits(hidden).shape[-1])
        bias[space[min(len(space) - 1, next(step))]] = 1e4
        return logits(hidden) + bias

    object.__setattr__(chat.tokens.network, "logits", whitespace)
    said = to_the_end(chat, "Hi", max_tokens=3)
    object.__setattr__(chat.tokens.network, "logits", logits)
    assert said == "a \n"[: len(said)] and said != said.rstrip()
    assert held_text(chat) == rendered(chat, [("Hi", said)])
