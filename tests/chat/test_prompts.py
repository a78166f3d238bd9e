"""What a conversation reads: the ids of the whole render, and what is pinned of them."""

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from mlx_stream.chat.prompts import PromptBuilder
from mlx_stream.text.template import ChatTemplate, shared_start
from mlx_stream.text.tokenizer import Tokenizer
from tests.engine.test_incremental_encoder import blank_lines, byte_level, sentence_pieces
from tests.fakes.turn_ids import read_ids, whole_ids
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


@pytest.mark.parametrize("tokenizer", [byte_level, sentence_pieces])
def test_a_word_that_was_stopped_in_its_middle_gets_no_space(tokenizer):
    backend, template = tokenizer(), ChatTemplate(LLAMA_2, TOKENS)
    turns = PromptBuilder(backend, template, None, pin=True)
    closing, asked = turns.following("en", "x")
    ids = [*backend.encode("th", special=False), *closing, *asked]
    assert backend.decode(ids).strip().startswith("then ")
    assert backend.decode(ids).endswith("[INST] x [/INST]")


def test_a_special_token_s_name_in_a_question_gets_no_spaces():
    """What is guarded is encoded in parts, of which only the first begins a text."""
    tokenizer = sentence_pieces()
    turns = PromptBuilder(tokenizer, ChatTemplate(LLAMA_2, TOKENS), None, pin=True)
    ids = turns.opening("the <s> end")
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
def test_what_closes_a_reply_is_not_cut_inside_a_special_token(source, closing):
    tokenizer = phi()
    tokenizer._tokenizer_config = {"eos_token": "<|endoftext|>", "chat_template": source}
    template = tokenizer.template
    assert template is not None and template.closing == closing
    turns = PromptBuilder(tokenizer, template, "Be brief.", pin=True)
    assert tokenizer.decode(turns.pinned) == "" or "Be brief." in tokenizer.decode(turns.pinned)
    assert turns.pinned and turns.head == [{"role": "system", "content": "Be brief."}]
    exchanges = EXCHANGES[:3]
    whole = whole_ids(tokenizer, template, "Be brief.", exchanges)
    assert read_ids(tokenizer, template, "Be brief.", exchanges) == whole[:-1]  # the text's end


def test_what_two_texts_share_ends_at_a_special_token_s_border():
    names = ["<|end|>", "<|user|>", "<|endoftext|>", "<a><|"]
    assert shared_start("<|end|><|endoftext|>", "<|end|><|user|>", names) == "<|end|>"
    assert shared_start("x<|end|>", "x<|endoftext|>", names) == "x"
    assert shared_start("x<|end|>y", "x<|end|>z", names) == "x<|end|>"
    assert shared_start("x<a><|user|>", "x<a><|end|>", names) == "x"
    assert shared_start("same", "same", names) == "same"
    assert shared_start("a<b", "a<c", []) == "a<"
