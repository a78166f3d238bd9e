"""ChatTemplate: real templates on a stream, and templates that are refused."""

import gc
import itertools
import json
import time
from datetime import datetime
from typing import Any

import pytest

from mlx_stream.errors import TemplateError
from mlx_stream.text.template import chat_template
from mlx_stream.text.template.chat_template import (
    MAX_SOURCE,
    ChatTemplate,
    assistant,
    system_turn,
    user,
)
from mlx_stream.text.tokenizer import template_source

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = messages[0]['content'] %}{% else %}{% set rest = messages %}"
    "{% set system = false %}{% endif %}{% for message in rest %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system != false %}"
    "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# The first Llama 3 templates always ask for a reply; later ones do when told to.
LLAMA_3_FIRST = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
ASKS = "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
LLAMA_3 = LLAMA_3_FIRST.replace(ASKS, "{% if add_generation_prompt %}" + ASKS + "{% endif %}")
LLAMA_3_1 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
    {{- tools | tojson(indent=4) }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL_01 = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)
MISTRAL_02 = MISTRAL_01.replace(
    "message['content'] + eos_token + ' '", "' ' + message['content'] + eos_token"
)
MISTRAL_03 = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("After the optional system message, roles must alternate") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}

{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported") }}
    {%- endif %}
{%- endfor %}
"""
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
LLAMA_3_TOKENS = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}

# name: source, tokens, closing, lead, trims, takes a system prompt
KNOWN: dict[str, tuple[str, dict[str, str], str, str, bool, bool]] = {
    "SmolLM2": (SMOLLM2, TOKENS, "<|im_end|>\n", "", False, True),
    "Llama 2": (LLAMA_2, TOKENS, " </s>", " ", True, True),
    "Llama 3": (LLAMA_3, LLAMA_3_TOKENS, "<|eot_id|>", "", True, True),
    "Llama 3.1": (LLAMA_3_1, LLAMA_3_TOKENS, "<|eot_id|>", "", True, True),
    "Mistral 0.1": (MISTRAL_01, TOKENS, "</s> ", "", False, False),
    "Mistral 0.2": (MISTRAL_02, TOKENS, "</s>", " ", False, False),
    "Mistral 0.3": (MISTRAL_03, TOKENS, "</s>", " ", True, False),
}
names = pytest.mark.parametrize("name", KNOWN)

TALK = [
    user("Hi"),
    assistant("Hello. Who are you?"),
    user("One who asks,\nin two lines {{ 7 * 6 }} <b>&amp;"),
    assistant("Ĝis! 😀"),
    user("  spaced  "),
    assistant(" also \n"),
]
SYSTEM = {"role": "system", "content": "Be brief."}


def template(name: str) -> ChatTemplate:
    return ChatTemplate(*KNOWN[name][:2])


# -------------------------------------------------------------------------- real templates


@names
@pytest.mark.filterwarnings("ignore")
def test_renders_as_transformers_does(name: str):
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    gc.collect()  # otherwise, collecting this import's garbage would count as the template's time

    source, tokens, *_, system = KNOWN[name]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    peer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=source, **tokens)
    before = [[], [SYSTEM]] if system or name == "Mistral 0.3" else [[]]
    for first, length, reply in itertools.product(before, range(1, 7), (True, False)):
        messages = [*first, *TALK[:length]]
        theirs = peer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply)
        assert ChatTemplate(source, tokens).render(messages, reply) == theirs


@names
def test_known_templates_pass_the_check(name: str):
    *_, closing, lead, trims, system = KNOWN[name]
    known = template(name)
    known.check(system=False)
    if system:
        known.check(system=True)
    assert (known.closing, known.lead, known.trims) == (closing, lead, trims)


@pytest.mark.parametrize(
    "name, system", [(n, None) for n in KNOWN] + [(n, "Be brief.") for n in KNOWN if KNOWN[n][-1]]
)
def test_a_stream_of_turns_is_the_whole_conversation(name: str, system: str | None):
    known = template(name)
    talk = [user("Hi"), assistant("Yes."), user("And?"), assistant("No."), user("\nWhy?")]
    text = known.opening(system, "Hi")
    for reply, question in (("Yes.", "And?"), ("No.", "\nWhy?")):
        text += known.lead + reply + known.closing + known.turn(question, system)
    before = [{"role": "system", "content": system}] if system else []
    assert text == known.render([*before, *talk], reply=True)


def test_turns_of_the_starter():
    known = template("SmolLM2")
    assert known.opening(None, "Hi") == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert known.opening("Be brief.", "Hi") == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    turn = "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
    assert known.turn("And?") == known.turn("And?", "Be brief.") == turn


def test_the_date_is_that_of_construction(monkeypatch: pytest.MonkeyPatch):
    class Clock(datetime):
        days = itertools.count(1)

        @classmethod
        def now(cls, tz: Any = None) -> "Clock":
            return cls(2031, 7, next(cls.days))

    monkeypatch.setattr(chat_template, "datetime", Clock)
    known = template("Llama 3.1")
    assert "Today Date: 01 Jul 2031" in known.opening(None, "Hi")
    assert "Today Date: 01 Jul 2031" in known.opening(None, "Hi")
    assert "Today Date: 02 Jul 2031" in template("Llama 3.1").opening(None, "Hi")


def test_json_is_written_as_transformers_writes_it():
    source = "{{ messages | tojson }}{{ {'b': '<é>', 'a': 1} | tojson(indent=1, sort_keys=true) }}"
    assert ChatTemplate(source).render([user("'&ü")], reply=False) == (
        '[{"role": "user", "content": "\'&ü"}]' + json.dumps({"a": 1, "b": "<é>"}, indent=1)
    ).replace("\\u00e9", "é")


def test_extensions_of_chat_templates_are_known():
    source = (
        "{% for m in messages %}\n"
        "    {% if loop.index > 2 %}{% break %}{% endif %}\n"
        "    {% generation %}\n{{- m.content }}{% endgeneration %}\n"
        "{% endfor %}\n"
    )
    # A block leaves behind neither the indentation of its line nor the line end.
    assert ChatTemplate(source).render(TALK, reply=False) == "HiHello. Who are you?"


def test_a_question_may_be_large():
    question = "long " * 1_000_000
    assert question in template("SmolLM2").opening(None, question)


def test_the_default_of_several_templates_is_used():
    entries = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    assert template_source({"chat_template": entries}) == "d"
    assert template_source({"chat_template": {"rag": "r", "default": "d"}}) == "d"
    assert template_source({}) is template_source({"chat_template": None}) is None


# ------------------------------------------------------------- templates that rewrite turns

CHATML = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '</>' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# These rewrite an exchange once another question follows.
SETTLES = {
    "drops the thinking of earlier turns": CHATML.replace(
        "m.content", "(m.content if loop.last else m.content.split('</think>')[-1])"
    ),
    "drops all thinking": CHATML.replace("m.content", "m.content.split('</think>')[-1]"),
    "thinks in the prompt": CHATML.replace("<assistant>{%", "<assistant><think>{%"),
    "marks the last turn": CHATML.replace("'</>'", "('</last>' if loop.last else '</>')"),
}
# These rewrite an exchange later than that, or do not write it exactly once.
REWRITES = {
    "writes before a reply": CHATML.replace(
        "m.content", "('Answer: ' if m.role == 'assistant' else '') + m.content"
    ),
    "keeps the last two exchanges": CHATML.replace("in messages", "in messages[-4:]"),
    "drops the thinking before the last three questions": CHATML.replace(
        "m.content",
        "(m.content if loop.revindex < 6 else m.content.split('</think>')[-1])",
    ),
    "counts the messages": "{{ messages | length }}" + CHATML,
    "counts the turns": CHATML.replace("m.content", "(m.content ~ loop.index)"),
    "numbers the questions": CHATML.replace(
        "m.content", "(m.content ~ (loop.index if m.role == 'user' else ''))"
    ),
    "counts its way to the third": CHATML.replace(
        "m.content", "(m.content if loop.index < 5 else m.content|upper)"
    ),
    "drops replies": CHATML.replace("in messages", "in messages if m.role == 'user'"),
    "doubles replies": CHATML.replace("m.content", "m.content + m.content"),
    "says nothing": "",
    "raises": "{{ raise_exception('not today') }}",
}


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("name", SETTLES)
def test_an_exchange_is_settled_as_the_next_question_finds_it(name, system):
    found = ChatTemplate(SETTLES[name])
    found.check(system=True)
    assert found.rewrites and not ChatTemplate(CHATML).rewrites
    exchanges = [("One?", "<think>\na\n</think>b"), ("Two?", "c"), ("Three?", "</think>\n\nd")]
    messages, before = [*system_turn(system)], ""
    for number, (question, reply) in enumerate(exchanges):
        messages += [user(question), assistant(reply)]
        before += (
            found.settled(question, assistant(reply), system, first=not number) + found.closing
        )
        asked = found.render([*messages, user("And?")], reply=True)
        assert asked == before + found.turn("And?", system)


@pytest.mark.parametrize("name", REWRITES)
def test_templates_that_do_more_than_append_are_refused(name: str):
    ChatTemplate(CHATML).check(system=True)
    with pytest.raises(TemplateError, match=r"^chat template: .*$"):
        ChatTemplate(REWRITES[name], LLAMA_3_TOKENS).check(system=False)


def test_the_refusal_gives_the_reason():
    with pytest.raises(
        TemplateError, match=r"rewrites earlier turns .* cannot be used on a stream"
    ):
        ChatTemplate(REWRITES["keeps the last two exchanges"]).check(system=False)


def test_a_closing_written_with_the_next_turn_is_appended():
    source = CHATML.replace("'</>'", "('</>' if not loop.last else '')")
    late = ChatTemplate(source.replace("<assistant>{%", "</><assistant>{%"))
    late.check(system=True)
    assert (late.closing, late.turn("q")) == ("", "</><user>q</><assistant>")


def test_a_template_without_a_place_for_a_system_prompt_is_refused():
    drops = CHATML.replace("in messages", "in messages if m.role != 'system'")
    with pytest.raises(TemplateError, match="no system role"):
        ChatTemplate(drops).check(system=True)
    with pytest.raises(TemplateError, match="it failed: Conversation roles must alternate"):
        template("Mistral 0.1").check(system=True)
    with pytest.raises(TemplateError, match="rewrites earlier turns"):  # the prompt moves
        template("Mistral 0.3").check(system=True)


# ----------------------------------------------------------------------- hostile templates

HOSTILE = {
    "python's insides": "{{ ''.__class__.__mro__ }}",
    "one forbidden name": "{{ ''.__class__ }}",
    "through format": "{{ '{0.__class__}'.format(messages) }}",
    "through a filter": "{{ messages | map(attribute='__class__') | list }}",
    "through a namespace": "{% set ns = namespace(a='') %}{{ ns.a.__class__ }}",
    "globals of functions": "{{ raise_exception.__globals__ }}",
    "a range without end": "{{ range(10**12) }}",
    "a power": "{{ 10 ** (10 ** 10) }}",
    "a folded power": "{{ 10000000 ** 10000000 }}",
    "a product": "{{ 'a' * 1000000000000 }}",
    "a product that would fit": "{{ ('a' * 2000000) | length }}",
    "a product of lists": "{{ 1000000000000 * [1] }}",
    "loops that write": (
        "{% for i in range(99999) %}{% for j in range(99999) %}text{% endfor %}{% endfor %}"
    ),
    "changes of the messages": "{{ messages.append(1) }}",
    "syntax": "{% for m in %}",
    "an open block": "{% if true %}",
    "an undefined function": "{{ no_such_function() }}",
    "parts of what is undefined": "{{ messages[0].tool.name }}",
    "no such filter": "{{ 1 | no_such_filter }}",
    "recursion": "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "deep nesting": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "a long sum": "{{ 1" + "+1" * 5_000 + " }}",
    "nested blocks": "{% if true %}" * 300 + "{% endif %}" * 300,
    "size": " " * (MAX_SOURCE + 1),
    "other files": "{% include '/etc/passwd' %}",
    "filler": "{{ lipsum(n=1000000) }}",
    "a division": "{{ 1 / 0 }}",
    "a type error": "{{ 'a' + 1 }}",
    "a bad date": "{{ strftime_now(1) }}",
    "lines": "{{ raise_exception('one\\ntwo\\n') }}",
    "a long message": "{{ raise_exception('long ' * 10000) }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_fail_quickly_in_one_line(name: str):
    began = time.monotonic()
    with pytest.raises(TemplateError) as caught:
        ChatTemplate(HOSTILE[name]).render([user("Hi")], reply=True)
    assert time.monotonic() - began < 5
    assert str(caught.value).startswith("chat template: ")
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 300


def test_ordinary_arithmetic_works():
    source = "{{ 6 * 7 }} {{ 2 ** 10 }} {{ '-' * 3 }} {{ 2 ** -1 }} {{ [0] * 2 }} {{ 1.5 * 2 }}"
    assert ChatTemplate(source).render([], reply=False) == "42 1024 --- 0.5 [0, 0] 3.0"


def test_a_template_that_always_asks_for_a_reply_still_only_appends():
    first = ChatTemplate(LLAMA_3_FIRST, LLAMA_3_TOKENS)
    first.check(system=True)
    text = first.opening("Be brief.", "One?") + "1." + first.closing
    text += first.turn("Two?", "Be brief.") + "2." + first.closing
    messages = [
        {"role": role, "content": content}
        for role, content in zip(
            ("system", "user", "assistant", "user", "assistant"),
            ("Be brief.", "One?", "1.", "Two?", "2."),
            strict=True,
        )
    ]
    assert first.render(messages, reply=False).startswith(text)
    assert text.endswith("2." + first.closing) and first.closing.startswith("<|eot_id|>")
