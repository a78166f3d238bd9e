"""Published tokenizers, cut down: turns, streamed text, and typed control tokens."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_stream.chat.prompts import PromptBuilder
from mlx_stream.text.tokenizer import Tokenizer
from tests.fakes.cut_tokenizers import CUT, cut_tokenizer
from tests.fakes.turn_ids import read_ids, replied, whole_ids

names = pytest.mark.parametrize("name", CUT)
TALK = [
    ("Hi there", "Hello.\n\n  The thin man."),
    ("And  then?\r\n", "then that \u4f60 \U0001f642"),
    ("the\n\n\nlines", "a\nb"),
    ("  12 the 123456", "the"),
    ("\u00e9 and", "An end."),
]


@cache
def tokenizer(name: str) -> Tokenizer:
    return cut_tokenizer(name)


@names
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("unread", ["", " the"], ids=["whole", "stopped inside an id"])
def test_turns_have_the_ids_of_the_whole_render(name: str, count: int, unread: str):
    backend = tokenizer(name)
    template = backend.template
    assert template
    talk = [(asked, said + unread) for asked, said in TALK[:count]]
    found = read_ids(backend, template, None, talk, unread, then="x")
    assert found == whole_ids(backend, template, None, talk, then="x")


@names
@settings(deadline=None)
@given(data=st.data())
def test_streamed_text_is_the_whole_text(name: str, data: st.DataObject):
    backend = tokenizer(name)
    ids = data.draw(st.lists(st.integers(0, backend.vocab_size), max_size=30))
    decoder = backend.decoder()
    assert "".join(map(decoder.add, ids)) + decoder.flush() == backend.decode(ids)


@names
def test_control_tokens_cannot_be_typed_and_close_a_reply(name: str):
    backend = tokenizer(name)
    template = backend.template
    assert template
    prompts = PromptBuilder(backend, template, None, pin=True)
    added = [text.removeprefix("!") for text in CUT[name].control.split(" ") if text.strip("!\n▁")]
    written = [text for text in added if "think" not in text and "call" not in text]
    ids = {id for text in written for id in backend.encode(text, special=False, behind_text=True)}
    question = "x".join(written) + "".join(written)
    typed, plain = (prompts.question(asked, replied("x"), first=False) for asked in (question, "x"))
    assert [id for id in typed[1] if id in ids] == [id for id in plain[1] if id in ids]
    assert set(plain[0]) & ids and set(plain[0]) & ids <= prompts.replies.end_ids
