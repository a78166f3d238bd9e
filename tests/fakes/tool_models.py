"""Small chat templates with tools, one for each format of calls, and what their models write."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import mlx.core as mx

from mlx_stream.generate.requests import ReadRequest, ReadResult, Want
from tests.chat.test_settle import Recorded

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Look it up.",
            "parameters": {"type": "object", "properties": {"of": {"type": "string"}}},
        },
    }
    for name in ("weather", "time")
]
# Thinking stays while tools are called, and is dropped once there is another question.
LAST_USER = (
    "{% set last = namespace(user=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
)
# Like Qwen 3's.
TAGGED = (
    LAST_USER + "<|im_start|>system\n{{ messages[0].content if messages[0].role == 'system' }}"
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}<|im_end|>\n"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}\n"
    "<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% elif m.role != 'system' or not loop.first %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > last.user and m.reasoning_content %}"
    "<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls %}{% set call = call.function %}"
    "{{ '\n' if m.content or not loop.first }}<tool_call>\n"
    '{"name": "{{ call.name }}", "arguments": {{ call.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Like gpt-oss's: calls are not rendered as the model writes them, and they end differently.
HARMONY = (
    "{% set ns = namespace(name='') %}<|start|>developer<|message|>"
    "{{ messages[0].content if messages[0].role == 'system' }}{{ tools | tojson if tools }}<|end|>"
    "{% for m in messages %}{% if m.role == 'tool' %}<|start|>functions.{{ ns.name }} to=assistant"
    "<|channel|>commentary<|message|>{{ m.content | tojson }}<|end|>"
    "{% elif m.role == 'assistant' %}{% set final = namespace(found=false) %}"
    "{% for later in messages[loop.index:] %}"
    "{% if later.role == 'assistant' and 'tool_calls' not in later %}"
    "{% set final.found = true %}{% endif %}{% endfor %}"
    "{% if 'tool_calls' in m %}{% set call = m.tool_calls[0].function %}"
    "{% set ns.name = call.name %}{% if m.thinking and not final.found %}"
    "<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant to=functions.{{ call.name }}<|channel|>commentary json<|message|>"
    "{{ call.arguments | tojson }}<|call|>"
    "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endif %}"
    "{% elif m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
# Like Llama 3.1's: one call at a time, results as JSON, and the tools where an option puts them.
LLAMA = (
    "{% if tools_in_user_message is not defined %}{% set tools_in_user_message = true %}{% endif %}"
    "{% macro head(role) %}<|start_header_id|>{{ role }}<|end_header_id|>\n\n{% endmacro %}"
    "{{ head('system') }}{{ tools | tojson(indent=1) if tools and not tools_in_user_message }}"
    "{{ messages[0].content if messages[0].role == 'system' }}<|eot_id|>"
    "{% for m in messages %}{% if m.tool_calls %}{% set call = m.tool_calls[0].function %}"
    "{% if m.tool_calls | length > 1 %}{{ raise_exception('one call at once') }}{% endif %}"
    '{{ head(\'assistant\') }}{"name": "{{ call.name }}", "parameters": '
    "{{ call.arguments | tojson }}}<|eot_id|>"
    "{% elif m.role == 'tool' %}{{ head('ipython') }}{{ m.content | tojson }}<|eot_id|>"
    "{% elif not loop.first or m.role != 'system' %}{{ head(m.role) }}"
    "{{ tools | tojson if tools and tools_in_user_message and loop.first }}"
    "{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ head('assistant') }}{% endif %}"
)
# Like Mistral's: calls have ids, which results repeat.
MISTRAL = (
    "[SYSTEM_PROMPT]{{ messages[0].content if messages[0].role == 'system' }}[/SYSTEM_PROMPT]"
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% elif m.tool_calls %}{{ m.content }}{% for call in m.tool_calls %}"
    "{% if call.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}"
    "[TOOL_CALLS]{{ call.function.name }}[CALL_ID]{{ call.id }}[ARGS]"
    "{{ call.function.arguments | tojson }}{% endfor %}</s>"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.tool_call_id }}[TOOL_CONTENT]{{ m.content }}"
    "[/TOOL_RESULTS]{% elif m.role == 'assistant' %}{{ m.content }}</s>{% endif %}{% endfor %}"
)


def tagged(calls: list[tuple[str, Any]], dump: Callable[[Any], str] = json.dumps) -> str:
    return "\n".join(
        f'<tool_call>\n{{"name": "{name}", "arguments": {dump(arguments)}}}\n</tool_call>'
        for name, arguments in calls
    )


def harmony(calls: list[tuple[str, Any]], dump: Callable[[Any], str] = json.dumps) -> str:
    ((name, arguments),) = calls
    header = f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"
    return header + dump(arguments)


def llama(calls: list[tuple[str, Any]], dump: Callable[[Any], str] = json.dumps) -> str:
    ((name, arguments),) = calls
    return f'{{"name": "{name}", "parameters": {dump(arguments)}}}'


def mistral(calls: list[tuple[str, Any]], dump: Callable[[Any], str] = json.dumps) -> str:
    return "".join(
        f"[TOOL_CALLS]{name}[CALL_ID]{place:09}[ARGS]{dump(arguments)}"
        for place, (name, arguments) in enumerate(calls)
    )


@dataclass(frozen=True)
class ToolModel:
    """A template and what its model writes.

    Attributes:
        thinking, thought: texts around its thinking, if it thinks.
        answer: what the model writes before an answer.
        calls: writes calls, given their names and arguments.
        ends: what ends a reply with calls, and one without.
        most: the maximum number of calls in a reply.
    """

    source: str
    calls: Callable[..., str]
    ends: tuple[str, str]
    thinking: tuple[str, str] = ("", "")
    answer: str = ""
    most: int = 2
    before_call: str = field(default="")

    def written(self, thinking: str, answer: str = "", calls: Any = (), **options: Any) -> str:
        """Return the text of a reply; one that calls tools has no answer."""
        text = thinking.join(self.thinking) if any(self.thinking) else ""
        if calls:
            return text + self.before_call + self.calls([*calls], **options) + self.ends[0]
        return text + self.answer + answer + self.ends[1]


HARMONY_MODEL = ToolModel(
    HARMONY,
    harmony,
    ("<|call|>", "<|return|>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
    "<|channel|>final<|message|>",
    most=1,
)
TAGGED_MODEL = ToolModel(
    TAGGED, tagged, ("<|im_end|>", "<|im_end|>"), ("<think>\n", "\n</think>\n\n")
)
# As in QwQ: the generation prompt also begins its thinking.
TOLD_TO_THINK = ToolModel(
    TAGGED.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"),
    tagged,
    ("<|im_end|>", "<|im_end|>"),
    ("", "\n</think>\n\n"),
)
LLAMA_MODEL = ToolModel(LLAMA, llama, ("<|eot_id|>", "<|eot_id|>"), most=1)
MISTRAL_MODEL = ToolModel(MISTRAL, mistral, ("</s>", "</s>"))
MODELS = {
    "tagged": TAGGED_MODEL,
    "harmony": HARMONY_MODEL,
    "llama": LLAMA_MODEL,
    "mistral": MISTRAL_MODEL,
}


def scripted(script: list[int], request: ReadRequest, result: ReadResult) -> ReadResult:
    """Return a step's result with the next token of a script, while it lasts."""
    if not script or result.count < len(request.ids):
        return result
    if request.want is Want.TOKEN:
        result.token = script.pop(0)
    elif request.want is Want.LOGITS:
        assert result.logits is not None
        chosen = mx.arange(len(result.logits)) == script.pop(0)
        result.logits = mx.where(chosen, 1e4, result.logits)
    return result


class Scripted(Recorded):
    """A stream whose next tokens are those of a script, while it lasts."""

    script: ClassVar[list[int]] = []

    def run(self, request: ReadRequest) -> ReadResult:
        request.more = False
        return scripted(self.script, request, super().run(request))
