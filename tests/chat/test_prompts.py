"""The ids that a conversation reads are those of the whole render; which of them are pinned."""

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from mlx_stream.chat.exchange import Exchange
from mlx_stream.chat.prompts import PromptBuilder
from mlx_stream.text.template.chat_template import (
    ChatTemplate,
)
from mlx_stream.text.tokenizer import Tokenizer
from tests.engine.test_incremental_encoder import blank_lines, byte_level, sentence_pieces
from tests.fakes.turn_ids import read_ids, replied, whole_ids
from tests.text.test_template import KNOWN, LLAMA_2, TOKENS

EXCHANGES = [
    ("Hi there", "Hello. The thin man."),
    ("And  then?", "then that"),
    ("the\nlines", "a\nb"),
    ("12", "the"),
    ("An end.", "No more"),
]
VICUNA = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{{ messages[0]['content'] + ' ' }}{% else %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}{% if message['role'] == 'user' %}"
    "{{ 'USER: ' + message['content'] + ' ' }}{% else %}"
    "{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
VICUNA_WITHOUT_END = VICUNA.replace("+ eos_token", "+ ' '")
PHI_4_MINI = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>'"
    " }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}"
    "{% endif %}"
)
PHI_3_5 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] +"
    " '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}"
    "{{ eos_token }}{% endif %}"
)
# Drops a reply's thinking once another question follows, as Qwen 3 does.
THINKS = (
    "{% set last = namespace(user=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 < last.user %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PHI_TOKENS = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]


@pytest.mark.parametrize("source", [LLAMA_2, VICUNA, VICUNA_WITHOUT_END, KNOWN["Mistral 0.3"][0]])
@pytest.mark.parametrize("tokenizer", [byte_level, blank_lines, sentence_pieces])
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("unread", ["", " the"], ids=["whole", "stopped inside an id"])
def test_turns_have_the_ids_of_the_whole_render(source, tokenizer, count, unread):
    backend, template = tokenizer(), ChatTemplate(source, TOKENS)
    exchanges = [(asked, said + unread) for asked, said in EXCHANGES[:count]]
    assert read_ids(backend, template, None, exchanges, unread) == whole_ids(
        backend, template, None, exchanges
    )


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("tokenizer", [byte_level, blank_lines, sentence_pieces])
@pytest.mark.parametrize("unread", ["", " the"], ids=["whole", "stopped inside an id"])
def test_settled_turns_have_the_ids_of_the_whole_render(tokenizer, system, unread):
    """The thinking of a reply is gone; its answer has the ids that were sampled."""
    backend, template = tokenizer(), ChatTemplate(THINKS, TOKENS)
    assert template.rewrites
    thoughts = ("the first", "", "a\n\nb", "", "An end")
    exchanges = [
        (asked, f"<think>\n{thought}\n</think>\n\n{said}{unread}" if thought else said + unread)
        for (asked, said), thought in zip(EXCHANGES, thoughts, strict=True)
    ]
    found = read_ids(backend, template, system, exchanges, unread, then="x")
    assert found == whole_ids(backend, template, system, exchanges, then="x")
    assert "think" not in backend.decode(found) and "An end." in backend.decode(found)


def test_an_answer_keeps_the_ids_that_were_sampled_where_its_text_would_get_others():
    tokenizer, template = byte_level(), ChatTemplate(THINKS, TOKENS)
    prompts = PromptBuilder(tokenizer, template, None, pin=True)
    _, asked = prompts.question("Hi", None, first=True)
    thought = tokenizer.encode("<think>the</think>", special=False)
    letters = [id for letter in "then" for id in tokenizer.encode(letter, special=False)]
    assert letters != tokenizer.encode("then", special=False)
    reply = "<think>the</think>then"
    exchange = Exchange("Hi", reply, (), asked, (*thought, *letters))
    assert prompts.settle(exchange, first=True).ids == (*asked, *letters)
    # If part of a reply has no sampled ids, its text is encoded.
    cut = Exchange("Hi", reply, (), asked, (*thought, *letters[:2]), rest="en")
    settled = prompts.settle(cut, first=True)
    assert settled.ids == (*asked, *tokenizer.encode("then", special=False))
    assert prompts.rest_of(settled) == "" and prompts.rest_of(cut) == "en"
    # An exchange that is rendered as it was read keeps its ids.
    plain = Exchange("Hi", "then", (), asked, tuple(letters))
    assert prompts.settle(plain, first=True).settled_ids is None


def test_exchanges_of_another_model_are_read_as_text():
    tokenizer, template = byte_level(), ChatTemplate(LLAMA_2, TOKENS)
    prompts = PromptBuilder(tokenizer, template, None, pin=True)
    ids = tuple(tokenizer.encode("then", special=False, behind_text=True))
    foreign = (tokenizer.vocab_size + 5, 1)
    exchanges = {
        1: Exchange("Hi", "then", (), (7, 7), ids),
        2: Exchange("And?", "the end", (9,), (7,), foreign),
        3: Exchange("So?", "that", (), (), tuple(tokenizer.encode("this", special=False))),
        4: Exchange("No?", "then", (), (), (*ids, min(prompts.replies.end_ids))),
    }
    found = prompts.encode_again(exchanges)
    assert [*found] == [1, 2, 3, 4]
    assert found[1].reply_ids == ids and found[1].rest == ""
    read = [(exchange.reply_ids, exchange.rest) for exchange in found.values()]
    assert read[1:] == [((), "the end"), ((), "that"), ((), "then")]
    for number, exchange in found.items():
        asked = prompts.question(exchange.question, found.get(number - 1), number == 1)
        assert (exchange.closing_ids, exchange.question_ids) == asked


@pytest.mark.parametrize("tokenizer", [byte_level, sentence_pieces])
def test_a_word_that_was_stopped_in_its_middle_gets_no_space(tokenizer):
    backend, template = tokenizer(), ChatTemplate(LLAMA_2, TOKENS)
    turns = PromptBuilder(backend, template, None, pin=True)
    closing, asked = turns.question("x", replied("en"), first=False)
    ids = [*backend.encode("th", special=False), *closing, *asked]
    assert backend.decode(ids).strip().startswith("then ")
    assert backend.decode(ids).endswith("[INST] x [/INST]")


def test_a_special_token_s_name_in_a_question_gets_no_spaces():
    """A name that is split is encoded in parts, of which only the first begins a text."""
    tokenizer = sentence_pieces()
    turns = PromptBuilder(tokenizer, ChatTemplate(LLAMA_2, TOKENS), None, pin=True)
    ids = turns.question("the <s> end", None, first=True)[1]
    assert tokenizer.decode(ids).replace(" ", "").count("<s>") == 1
    assert "< s>" not in tokenizer.decode(ids)


def phi() -> Tokenizer:
    characters = sorted({chr(code) for code in range(32, 127)} - {" "})
    vocabulary = [*PHI_TOKENS, "Ġ", "Ċ", *characters]
    backend = Backend(models.BPE(vocab={t: i for i, t in enumerate(vocabulary)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(PHI_TOKENS)
    return Tokenizer(backend, {"eos_token": "<|endoftext|>"})


@pytest.mark.parametrize(
    ("source", "closing"), [(PHI_3_5, "<|end|>\n"), (PHI_4_MINI, "<|end|>")], ids=["3.5", "4-mini"]
)
def test_a_reply_s_closing_is_not_cut_inside_a_special_token(source, closing):
    tokenizer = phi()
    tokenizer._tokenizer_config = {"eos_token": "<|endoftext|>", "chat_template": source}
    template = tokenizer.template
    assert template is not None and template.closing == closing
    turns = PromptBuilder(tokenizer, template, "Be brief.", pin=True)
    assert tokenizer.decode(turns.pinned) == "" or "Be brief." in tokenizer.decode(turns.pinned)
    assert turns.pinned and turns.head == [{"role": "system", "content": "Be brief."}]
    exchanges = EXCHANGES[:3]
    whole = whole_ids(tokenizer, template, "Be brief.", exchanges)
    assert read_ids(tokenizer, template, "Be brief.", exchanges) == whole[:-1]  # end of text


# The system prompt begins the first question, as in Gemma 3.
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role != 'system' %}<start_of_turn>{{ m.role }}\n"
    "{{ messages[0].content + '\n\n' if loop.index0 == 1 and messages[0].role == 'system' }}"
    "{{ m.content | trim }}<end_of_turn>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
)


@pytest.mark.parametrize("tokenizer", [byte_level, sentence_pieces])
@pytest.mark.parametrize("evicted", [0, 1, 3])
def test_a_system_prompt_in_the_first_question_is_pinned_there(tokenizer, evicted):
    """Of the attended turns, the oldest one is rendered as the first, with the system prompt."""
    backend, template = tokenizer(), ChatTemplate(GEMMA, TOKENS)
    prompts = PromptBuilder(backend, template, "Be brief.", pin=True)
    assert prompts.system_place == "question"
    assert backend.decode(prompts.pinned).strip().endswith("user\nBe brief.")
    ids, last = [*prompts.pinned], None
    for number, (question, reply) in enumerate(EXCHANGES, 1):
        if number <= evicted:
            continue
        closing, asked = prompts.question(question, last, first=number == 1)
        said = backend.encode(reply, special=False, behind_text=True)
        last = prompts.settle(Exchange(question, reply, closing, asked, tuple(said)), number == 1)
        ids += closing + last.ids
    assert ids == whole_ids(backend, template, "Be brief.", EXCHANGES[evicted:])[: len(ids)]


@pytest.mark.parametrize(
    ("source", "place"),
    [(GEMMA, "question"), (PHI_3_5, "turn"), (KNOWN["Mistral 0.3"][0], "exchange")],
)
def test_where_the_system_prompt_is(source, place):
    backend, template = byte_level(), ChatTemplate(source, TOKENS)
    assert PromptBuilder(backend, template, "Be brief.", pin=True).system_place == place
    without = PromptBuilder(backend, template, None, pin=True)
    assert without.system_place == "turn" and len(without.pinned) < 9
