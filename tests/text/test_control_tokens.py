"""No message encodes to a token that a template writes around messages, whatever the flags say."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from mlx_stream.chat.prompts import PromptBuilder
from mlx_stream.engine.incremental_encoder import IncrementalEncoder
from mlx_stream.text.control_tokens import PROBE, ControlTokens, has_part_at_an_end
from mlx_stream.text.template.chat_template import ChatTemplate
from mlx_stream.text.tokenizer import Tokenizer
from tests.fakes.tiny import CHAT_TEMPLATE
from tests.fakes.turn_ids import replied

START, END, THINK = "<|im_start|>", "<|im_end|>", "<think>"
# A tokenizer's normalizer, and spellings of START that only it maps to START.
NORMALIZERS = {
    "none": (None, []),
    "NFKC": (normalizers.NFKC(), ["\uff1c|im_start|\uff1e", "<|\uff49\uff4d_start|>"]),
    "lower case": (normalizers.Lowercase(), ["<|IM_START|>", "<|im_Start|>"]),
    "one character": (normalizers.Replace("§", START), ["§", "§§", "a§b"]),
    "a run": (normalizers.Replace(Regex("§+"), START), ["§" * 9, "§ §"]),
    "no spaces": (
        normalizers.Replace(" ", ""),
        ["<|im_ start|>", "< |im_start|>", "<|im_start|> "],
    ),
    "SentencePiece": (
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        [" <|im_start|>", "▁<|im_start|>"],
    ),
    "two": (
        normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]),
        ["\uff1c|IM_\uff53tart|\uff1e", "<|İm_start|>"],
    ),
}
PLAIN = ["<", "|", "<|", "|>", "<|im_", "start|>", "im_start|>", "|im_start|>", "end|>", " ", "\n"]
PLAIN += [START, END, THINK, "</think>", f"<{START}|im_start|>", "x", "the ", "\ufdd0", "[INST]"]
# Around the question: as published, without a line end, and next to part of a name.
AROUND = {
    "ChatML": CHAT_TEMPLATE,
    "thinks": CHAT_TEMPLATE.replace("assistant\\n'", "assistant\\n<think>\\n'"),
    "no line end": CHAT_TEMPLATE.replace("+ '\\n' + message", "+ message"),
    "beside parts": (
        "{% for m in messages %}<|im_start|>{{ m.role }}<{{ m.content }}start|><|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<{% endif %}"
    ),
}


def made_up(
    normalizer: object, *, special: bool, normalized: bool, unigram: bool, strips: bool = False
) -> Tokenizer:
    """Return a tokenizer of single characters; `unigram` has the control tokens as words too."""
    letters = sorted({*map(chr, range(32, 127)), *pre_tokenizers.ByteLevel.alphabet(), "▁"})
    names = [START, END, THINK]
    if unigram:
        vocabulary = [(name, -1.0) for name in names] + [(letter, -9.0) for letter in letters]
        backend = Backend(models.Unigram([("<unk>", -20.0), *vocabulary], 0, False))
    else:
        tokens = ["<unk>", *names, *letters]
        vocabulary = {token: id for id, token in enumerate(tokens)}
        backend = Backend(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    if normalizer:
        backend.normalizer = normalizer
    backend.decoder = decoders.Fuse()
    if not unigram:
        backend.add_tokens(
            [
                AddedToken(n, special=special, normalized=normalized, lstrip=strips, rstrip=strips)
                for n in names
            ]
        )
    return Tokenizer(backend, {})


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", NORMALIZERS)
@settings(deadline=None, max_examples=15)
@given(data=st.data(), special=st.booleans(), normalized=st.booleans(), unigram=st.booleans())
def test_no_message_encodes_to_a_control_token(name, around, data, special, normalized, unigram):
    normalizer, spellings = NORMALIZERS[name]
    tokenizer = made_up(
        normalizer,
        special=special,
        normalized=normalized,
        unigram=unigram,
        strips=data.draw(st.booleans()),
    )
    template = ChatTemplate(AROUND[around])
    texts = st.lists(st.sampled_from(PLAIN + spellings * 3), max_size=6).map("".join)
    question, reply, system = (data.draw(texts) for _ in range(3))
    thinks = around == "thinks" or (special and not unigram)

    def read(system: str, question: str, reply: str) -> list[list[str]]:
        prompts = PromptBuilder(tokenizer, template, system, pin=True)
        first = prompts.pinned + prompts.question(question, None, first=True)[1]
        closing, later = prompts.question(question, replied(reply), first=False)
        return [
            [text for text in map(tokenizer.text_of, ids) if text in (START, END, *more)]
            for ids, more in ((first, [THINK] * thinks), (closing, ()), (later, [THINK] * thinks))
        ]

    assert read(system, question, reply) == read(PROBE, PROBE, PROBE)


@pytest.mark.parametrize("around", ["ChatML", "beside parts"])
@pytest.mark.parametrize("name", NORMALIZERS)
@settings(deadline=None, max_examples=15)
@given(data=st.data(), special=st.booleans(), normalized=st.booleans(), unigram=st.booleans())
def test_no_fed_text_encodes_to_a_control_token(name, around, data, special, normalized, unigram):
    normalizer, spellings = NORMALIZERS[name]
    tokenizer = made_up(
        normalizer,
        special=special,
        normalized=normalized,
        unigram=unigram,
        strips=data.draw(st.booleans()),
    )
    prompts = PromptBuilder(tokenizer, ChatTemplate(AROUND[around]), None, pin=True)
    fed = data.draw(st.lists(st.sampled_from(PLAIN + spellings * 3), max_size=9))
    turn = prompts.open_turn()
    encoder = IncrementalEncoder(prompts, turn.opening, turn.lead)
    ids = [id for text in fed for id in encoder.add(text)]
    ends = encoder.end_turn(encoder.pending, data.draw(st.sampled_from(PLAIN)), turn.closing)
    wanted = encoder.end_turn("", "x", turn.closing)
    ids += encoder.flush()

    def control(ids: Sequence[int]) -> list[str]:
        return [text for text in map(tokenizer.text_of, ids) if text in (START, END)]

    assert (control(ids), control(ends)) == ([], control(wanted))


def test_a_reply_ends_where_the_template_closes_it_or_opens_a_turn():
    tokenizer = made_up(None, special=False, normalized=False, unigram=False)
    for source in AROUND.values():
        control = ControlTokens(tokenizer, ChatTemplate(source))
        assert set(map(tokenizer.text_of, control.end_ids)) == {START, END}
    asks = "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}"
    control = ControlTokens(tokenizer, ChatTemplate(asks + "<think>{% endif %}"))
    assert set(map(tokenizer.text_of, control.ids)) == {THINK}


def test_text_that_is_no_control_token_is_left_as_it_is():
    tokenizer = made_up(None, special=False, normalized=False, unigram=False)
    control = ControlTokens(tokenizer, ChatTemplate(CHAT_TEMPLATE))
    for text in ("", "user\n", "你 \U0001f642", "the <think> of \n\n", "a < b | c > d", "[INST]"):
        assert control.escape(text) == text
    assert control.escape("a<|im_end|>b") == "a<|im_\ufdd0end|>b"
    thinks = ControlTokens(tokenizer, ChatTemplate(AROUND["thinks"]))
    assert thinks.escape(THINK) != THINK and thinks.escape(THINK, reply=True) == THINK


def test_a_word_that_is_a_token_cannot_be_typed_and_does_not_end_a_reply():
    """A template may write such a word without using it as a control token."""
    letters = {letter: id for id, letter in enumerate(sorted(map(chr, range(32, 127))), 1)}
    backend = Backend(models.BPE(vocab={"<unk>": 0, **letters}, merges=[], unk_token="<unk>"))
    backend.add_tokens(["user", "assistant", "content", "<br>", "#"])
    tokenizer = Tokenizer(backend, {})
    source = "{% for m in messages %}# {{ m.role }}: {{ m.content }} {% endfor %}"
    source += "{% if add_generation_prompt %}# assistant: {% endif %}"
    control = ControlTokens(tokenizer, ChatTemplate(source))
    assert set(map(tokenizer.text_of, control.ids)) == {"user", "assistant"}
    assert control.end_ids == set()
    assert control.escape("a user # content <br>") == "a us\ufdd0er # content <br>"


def test_a_long_text_that_only_a_normalizer_makes_a_control_token_is_cut_in_few_steps():
    tokenizer = made_up(NORMALIZERS["a run"][0], special=False, normalized=True, unigram=False)
    control = ControlTokens(tokenizer, ChatTemplate(CHAT_TEMPLATE))
    find, found = tokenizer.find, list[str]()

    def counted(text, ids):
        found.append(text)
        return find(text, ids)

    tokenizer.find = counted
    assert control.escape("§" * 5_000 + "x").replace("\ufdd0", "") == "x"
    assert len(found) < 100 and sum(map(len, found)) < 50_000


@given(
    st.lists(st.text("ab", min_size=1, max_size=5)), st.lists(st.text("ab", max_size=7), max_size=3)
)
def test_parts_of_names_are_found_at_the_ends_of_texts(names: list[str], texts: list[str]):
    assert has_part_at_an_end(names, texts) == any(
        text.endswith(name[:at]) or text.startswith(name[at:])
        for name in names
        for text in texts
        for at in range(1, len(name))
    )
