"""Hold chains of three tool calls with stand-in models, on real chat templates.

    python -m tests.long.tool_calls TEMPLATE...

Each model has random weights and a tokenizer with the template's special tokens, and writes what a
script says: calls as the template writes them, and with different spacing. After each reply the
attended ids must be what the template renders. At the end the logits must equal, bit for bit, those
of a stream with the same steps. Prints a line for each template: what was done, or why it was
refused.
"""

import argparse
import json
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import mlx_stream  # isort: skip  # first: it loads OpenBLAS ahead of MLX

from mlx_stream.chat.messages import Message
from mlx_stream.errors import TemplateError
from mlx_stream.text.template.chat_template import ChatTemplate
from mlx_stream.text.tool_calls import call_style_of, read_harmony, read_llama, read_mistral
from tests.chat.test_settle import Trouble, check_logits, recorded, resumed
from tests.fakes.conversations import assert_well_formed
from tests.fakes.thinkers import write_random
from tests.fakes.tool_models import TOOLS, Scripted, ToolModel, harmony, llama, tagged
from tests.long.thinking import end_of

CALLS = [("weather", {"of": "Rome"})]


def mistral(calls: list[tuple[str, Any]], dump: Any = json.dumps) -> str:
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{dump(arguments)}" for name, arguments in calls)


def kind_of(template: ChatTemplate) -> ToolModel:
    """Return what a model with this template writes."""
    style, source = call_style_of(template.source), template.source
    end, marks = end_of(source), ("", "")
    if template.style:
        opening = "" if template.thinks_first else template.style.openings[0]
        marks = opening, template.style.closing + "\n\n"
    if style and style.read is read_harmony:
        marks = marks[0], "<|end|><|start|>assistant"
        answer = "<|channel|>final<|message|>"
        return ToolModel(source, harmony, ("<|call|>", end), marks, answer)
    if style and style.read is read_llama:
        return ToolModel(source, llama, ("<|eot_id|>", "<|eot_id|>"))
    written = mistral if style and style.read is read_mistral else tagged
    return ToolModel(source, written, (end, end), marks)


def talk(source: str, folder: Path, dump: Any) -> dict[str, Any]:
    kind = kind_of(ChatTemplate(source, {"bos_token": "", "eos_token": "</s>"}))
    path, config, weights = write_random(folder, source, kind.ends[1], 24_000)
    model = mlx_stream.load(path, dtype="float32", keep_quantized=False)
    chat = recorded(model, Trouble(), Scripted, window=4_000, tools=TOOLS, max_tokens=900)
    turns = 0

    def write(question: Any, *reply: Any, act: Any = None) -> None:
        nonlocal turns
        text = kind.written(*reply, **({"dump": dump} if len(reply) > 2 else {}))
        Scripted.script = model.tokenizer.encode(text, special=False)
        list(act() if act else chat.reply(question))
        assert not Scripted.script, "the reply ended early"
        assert_well_formed(chat)
        turns += 1

    write("Hi", "So", "Hello.")
    for number in range(3):
        asked: Any = [Message("tool", f"It is {number}.")] if number else "What is it like?"
        write(asked, f"Thought {number}", "", CALLS)
        assert [call.name for call in chat.exchanges[-1].calls] == ["weather"], chat.exchanges[-1]
    write([Message("tool", "Fine.")], "At last", "It is fine.")
    write("", "Again", "Very fine.", act=chat.retry)
    chat.undo()
    assert_well_formed(chat)
    write([Message("tool", "Fine.")], "At last", "It is fine.")
    write("Bye", "", "Bye.")
    twin = resumed(chat, Trouble())
    twin.tokens.steps_taken = [*chat.tokens.steps_taken]
    check_logits(twin, config, weights)
    pinned = len(chat.prompts.pinned)
    return {"replies": turns, "settled": chat.stats.settled, "pinned": pinned}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("templates", nargs="+", type=Path)
    failed = 0
    for path in parser.parse_args().templates:
        found: dict[str, Any] = {}
        for name, dump in (("canonical", json.dumps), ("spaced", spaced)):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    found[name] = talk(path.read_text("utf-8"), Path(folder), dump)
                except TemplateError as error:
                    found[name] = f"refused: {error}"
                except Exception as error:  # it is reported, and the next template is tried
                    traceback.print_exc()
                    found[name], failed = f"failed: {error!r}"[:300], 1
        print(json.dumps({"template": path.stem, **found}), flush=True)
    return failed


def spaced(value: Any) -> str:
    """Return JSON with spacing that no template writes."""
    return json.dumps(value, separators=(" ,  ", " : "))


if __name__ == "__main__":
    sys.exit(main())
