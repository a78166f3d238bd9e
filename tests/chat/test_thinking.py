"""A model that thinks: what it is told, what is kept, and what ends its thinking."""

import pytest

import mlx_stream
from mlx_stream.chat.resume import SessionOptions, open_session
from mlx_stream.chat.store import Store
from mlx_stream.errors import TemplateError
from mlx_stream.sampling import Sampling
from tests.chat.test_settle import DROPS_THINKING, SCRIPT, THINKS
from tests.fakes.conversations import assert_well_formed, said
from tests.fakes.thinkers import write_thinker

GREEDY = Sampling(temperature=0)
# Thinks in an endless loop; the answer begins with the text that ends thinking.
ENDLESS = ("<think>", *"abcdefghi", "a")
SWITCH = DROPS_THINKING.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is defined and not enable_thinking %}<think></think>p"
    "{% endif %}{% endif %}",
)
EFFORT = (
    "{% if reasoning_effort %}<|im_start|>system\n{{ reasoning_effort }}<|im_end|>\n{% endif %}"
)


def thinker(folder, source=THINKS["thinks"], script=SCRIPT, **options):
    model = mlx_stream.load(write_thinker(folder, source, script, "<|im_end|>"), dtype="float32")
    options = {"sampling": GREEDY, "window": 200} | options
    return mlx_stream.ChatSession(model, **options)


@pytest.mark.parametrize("name", THINKS)
def test_pieces_say_what_is_thinking_and_the_reply_is_the_answer(name, tmp_path):
    chat = thinker(tmp_path / "model", THINKS[name])
    for question in ("Hi", "And then?"):
        pieces = [*chat.reply(question)]
        assert "".join(piece.thinking for piece in pieces) == "abcdefghi"
        assert said(pieces) == "jklmno" and pieces[-1].finish == "end"
        last = chat.exchanges[-1]
        assert (last.reply, last.thinking) == ("jklmno", "abcdefghi")
        assert_well_formed(chat)
    text = chat.model.tokenizer.decode(chat.tokens.ids.attended())
    kept = {"keeps its thinking": 2, "drops it late": 1}
    assert text.count("abcdefghi") == kept.get(name, 0)
    assert text.count("jklmno") == 2


def test_the_limit_of_a_reply_counts_the_answer(tmp_path):
    chat = thinker(tmp_path / "model", max_tokens=3)
    pieces = [*chat.reply("Hi")]
    assert said(pieces) == "jkl" and pieces[-1].finish == "length"
    assert chat.exchanges[-1].thinking == "abcdefghi"


@pytest.mark.parametrize("window", [60, 120])
def test_thinking_that_does_not_end_is_ended(tmp_path, window):
    """It ends at half the window, as if the model had ended it; then the answer follows."""
    source, options = THINKS["is told to think"], {"window": window, "max_tokens": 5}
    chat = thinker(tmp_path / "model", source, ENDLESS, **options)
    for _ in range(3):
        pieces = [*chat.reply("Hi")]
        thinking = "".join(piece.thinking for piece in pieces)
        assert len(thinking.strip()) == window // 2
        assert pieces[-1].finish == "length"
        assert_well_formed(chat)
        assert chat.exchanges[-1].question == "Hi"


def test_thinking_that_begins_again_in_the_answer_ends_the_reply(tmp_path):
    """The template would treat the whole answer as thinking."""
    chat = thinker(tmp_path / "model", script=("Ċ", "<think>", *"ab", "</think>", *"jk", "<think>"))
    for _ in range(2):
        pieces = [*chat.reply("Hi")]
        assert said(pieces) == "jk" and pieces[-1].finish == "end"
        assert_well_formed(chat)


def test_stop_strings_are_of_the_answer(tmp_path):
    chat = thinker(tmp_path / "model", stop=["l", "d"])
    assert said(chat.reply("Hi")) == "jk"
    assert chat.exchanges[-1].thinking == "abcdefghi"


def test_a_reply_cut_in_its_thinking_has_an_empty_answer(tmp_path):
    chat = thinker(tmp_path / "model")
    pieces = chat.reply("Hi")
    assert next(pieces).thinking == "a" and next(pieces).thinking == "b"
    pieces.close()
    last = chat.exchanges[-1]
    assert (last.reply, last.thinking, last.finish) == ("", "ab", "interrupted")
    assert_well_formed(chat)
    assert said(chat.retry()) == "jklmno"
    assert_well_formed(chat)


def test_a_switch_is_told_to_the_template_and_one_that_is_not_there_is_refused(tmp_path):
    chat = thinker(tmp_path / "model", SWITCH, script=("p", *SCRIPT[13:]), think=False)
    assert said(chat.reply("Hi")) == "jklmno" and not chat.exchanges[-1].thinking
    assert_well_formed(chat)
    model = chat.model
    with pytest.raises(TemplateError, match="`reasoning_effort`"):
        mlx_stream.ChatSession(model, reasoning_effort="low")
    plain = thinker(tmp_path / "plain").model
    with pytest.raises(TemplateError, match="no switch"):
        mlx_stream.ChatSession(plain, think=True)


def test_how_hard_to_think_is_told_to_the_template(tmp_path):
    chat = thinker(tmp_path / "model", EFFORT + DROPS_THINKING, reasoning_effort="high")
    assert said(chat.reply("Hi")) == "jklmno"
    assert "high" in chat.model.tokenizer.decode(chat.tokens.ids.attended())


def test_a_saved_conversation_keeps_both(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_STREAM_HOME", str(tmp_path / "home"))
    model = thinker(tmp_path / "model").model
    options = SessionOptions(window=200, sampling=GREEDY)
    saved = open_session("one", model, options)
    said(saved.chat.reply("Hi"))
    attended = saved.chat.tokens.ids.attended()
    saved.close()
    with Store.open(saved.paths.database) as store:
        exchange = store.exchanges(1)[1]
    assert (exchange.reply, exchange.thinking) == ("jklmno", "abcdefghi")
    notices = []
    again = open_session("one", model, options, notices.append)
    assert not notices and again.chat.tokens.ids.attended() == attended
    assert again.chat.exchanges[-1].thinking == "abcdefghi"
    assert said(again.chat.retry()) == "jklmno"
    assert_well_formed(again.chat)
    again.close()
