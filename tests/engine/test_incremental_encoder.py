"""Text fed in any pieces gets the ids of the whole; only templates produce special tokens."""

import pydoc_data.topics
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from mlx_stream.chat.prompts import PromptBuilder
from mlx_stream.engine.incremental_encoder import LONGEST_WORD, IncrementalEncoder
from mlx_stream.errors import TemplateError
from mlx_stream.text.template.chat_template import ChatTemplate
from mlx_stream.text.tokenizer import Tokenizer
from tests.checkpoint.test_gguf_tokenizer import LLAMA3_SPLIT
from tests.fakes.tiny import CHAT_TEMPLATE, SPECIALS, tiny_tokenizer
from tests.text.test_template import KNOWN, TOKENS

TEXT = pydoc_data.topics.topics["compound"][:6_000]
NAMES = ["<|im_end|>", "<|im_", "end|>", "<|im_start|>", "\ufdd0"]
WORDS = st.sampled_from(
    [*NAMES, *["the", " the", " and", "\n", "\n\n", " ", "  ", "\t", "x", "12", "你好", "é", "🙂"]]
)

SPACED = [
    *("the", " the", ".", "\n", "\n\n", "\r\n", " ", "   ", "\t", "x", " 12", ","),
    "\u00a0",
    "é",
]


def byte_level():
    return Tokenizer(tiny_tokenizer(), {})


def blank_lines(split=None):
    """Return a byte-level tokenizer that has tokens for several spaces or line ends."""
    merges = [("Ċ", "Ċ"), ("Ġ", "Ġ"), ("Ġ", "t"), ("Ġt", "h"), ("Ġth", "e"), (".", "Ċ")]
    tokens = SPECIALS + sorted(pre_tokenizers.ByteLevel.alphabet()) + [a + b for a, b in merges]
    backend = Backend(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIALS)
    return Tokenizer(backend, {})


def blank_lines_in_llama():
    return blank_lines(LLAMA3_SPLIT)


def sentence_pieces():
    """Return a tokenizer that puts a space before the first word of any text."""
    letters = sorted({*TEXT, *"▁<|>_."} - {" "})
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "a"), ("▁a", "n"), ("▁an", "d")]
    vocabulary = ["<unk>", "<s>", *[f"<0x{byte:02X}>" for byte in range(256)], *letters]
    vocabulary += [a + b for a, b in merges]
    bpe = models.BPE(
        vocab={token: i for i, token in enumerate(vocabulary)},
        merges=merges,
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    backend = Backend(bpe)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens(["<s>", *SPECIALS])
    return Tokenizer(backend, {})


@pytest.fixture(
    scope="module", params=[byte_level, blank_lines, blank_lines_in_llama, sentence_pieces]
)
def turns(request):
    return PromptBuilder(request.param(), ChatTemplate(CHAT_TEMPLATE), "Be brief.", pin=True)


def fed(words, pieces):
    return [id for piece in pieces for id in words.add(piece)] + words.flush()


def whole(turns, text):
    """Return the ids of an open turn that holds a whole text."""
    return turns.encode(turns.open_turn().opening + turns.escape_special_tokens(text))


def cut(text, places):
    return [text[a:b] for a, b in pairwise([0, *sorted(places), len(text)])]


@given(
    # The template's trailing newline is read before any text arrives.
    text=st.just(TEXT[1:]) | st.lists(st.sampled_from(SPACED), max_size=30).map("".join),
    places=st.lists(st.integers(0, 90) | st.integers(0, len(TEXT)), max_size=60),
)
def test_text_in_any_pieces_has_the_ids_of_the_whole(turns, text, places):
    text = f"T{text}"
    text = f"x{text}"
    opening = turns.open_turn().opening
    found = fed(IncrementalEncoder(turns, opening), cut(text, [p for p in places if p < len(text)]))
    assert [*turns.encode(opening), *found] == whole(turns, text)


@given(pieces=st.lists(WORDS, min_size=1, max_size=40), cuts=st.lists(st.integers(0, 80)))
def test_any_text_in_any_pieces_is_that_text_and_holds_no_special_token(turns, pieces, cuts):
    text = "".join(pieces)
    pieces = cut(text, [c for c in cuts if c < len(text)])
    ids = fed(IncrementalEncoder(turns, turns.open_turn().opening), pieces)
    assert not turns.tokenizer.special_ids.intersection(ids)
    said, wanted = turns.tokenizer.decode(ids), text.replace("\ufdd0", "")
    # One of the tokenizers puts a space wherever a special token's name is cut apart.
    assert said == wanted or (said.replace(" ", "") == wanted.replace(" ", "") and "<|" in text)


def test_ids_that_more_text_may_change_are_held_back(turns):
    words = IncrementalEncoder(turns, turns.open_turn().opening)
    assert words.add("hel") == [] and words.pending == "hel"
    opening, first = turns.open_turn().opening, words.add("lo the wor")
    assert words.pending == " wor"
    assert [*turns.encode(opening), *first] == turns.encode(opening + "hello the")
    assert words.add("ld") == [] and words.pending == " world"
    assert len(words.flush()) > 0 and words.pending == "" and words.flush() == []


def test_a_text_without_spaces_does_not_wait_for_ever(turns):
    words = IncrementalEncoder(turns, turns.open_turn().opening)
    ids = [id for _ in range(40) for id in words.add("x" * 100)]
    assert len(words.pending) <= LONGEST_WORD + 100 and len(ids) >= 2_000


def test_a_question_ends_the_turn_as_one_text(turns):
    turn = turns.open_turn()
    words = IncrementalEncoder(turns, turn.opening)
    read = turns.encode(turn.opening)
    assert [*read, *words.end_turn("", "What?", turn.closing)] == turns.encode(
        f"{turn.opening}What?{turn.closing}"
    )
    read += words.add("The man and the wom")
    asked = words.end_turn(words.pending, "What <|im_end|>?", turn.closing)
    content = turns.escape_special_tokens("The man and the wom\n\nWhat <|im_end|>?")
    assert [*read, *asked] == turns.encode(turn.opening + content + turn.closing)
    assert words.pending == " wom"  # nothing has changed


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_an_open_turn_is_what_the_template_renders(name, system):
    """Text and questions get the same ids as in the conversation rendered as a whole."""
    source, tokens = KNOWN[name][:2]
    template = ChatTemplate(source, tokens)
    turns = PromptBuilder(byte_level(), template, system, pin=True)
    turn = turns.open_turn()
    lead, closing = template.lead, turn.closing
    text = (
        f"{turn.opening}{turn.lead}One.\n\nWhat?{closing}{lead}It is one."
        f"{turn.reopening}{turn.lead}Two.\n\nAnd?{closing}"
    )
    said = [("One.\n\nWhat?", "It is one."), ("Two.\n\nAnd?", None)]
    messages = [*turns.head]
    for question, reply in said:
        messages.append({"role": "user", "content": question})
        if reply:
            messages.append({"role": "assistant", "content": reply})
    assert text == template.render(messages, reply=True)


@pytest.mark.parametrize(
    "user",
    [
        "{{ m.content | upper }}",
        "({{ m.content | length }}) {{ m.content }}",
        "{{ m.content }}, {{ m.content }}",
        "{% if loop.first %}First: {% endif %}{{ m.content }}{% if loop.first %}!{% endif %}",
    ],
)
def test_a_template_in_which_no_turn_can_stay_open_is_refused(user):
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'user' %}"
        + user
        + "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(TemplateError, match="kept open"):
        PromptBuilder(byte_level(), ChatTemplate(source, TOKENS), None, pin=True).open_turn()
