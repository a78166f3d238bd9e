"""Talk with stand-in models that think, on real chat templates, and check every turn.

    python -m tests.long.thinking TEMPLATE...

Each model has random weights and a tokenizer with the template's special tokens, and writes what
a script says. After each of five turns, and after retry, undo, edit, a reply stopped while
thinking, resuming and evictions, the attended ids must be what the template renders, and the logits
must equal, bit for bit, those of a stream with the same steps. Prints a line for each template;
exits 1 if one failed. Takes minutes.
"""

import argparse
import json
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import mlx_stream  # isort: skip  # first: it loads OpenBLAS ahead of MLX

from mlx_stream.text.thinking import ThinkingStyle
from tests.chat.test_settle import Trouble, check_logits, recorded, resumed
from tests.fakes.conversations import assert_well_formed
from tests.fakes.thinkers import NAMES, write_random
from tests.fakes.tool_models import Scripted

QUESTIONS = ("Hi", "And then?\nTell me.", "Why äöü €?", "Go on", "And the man?")
THOUGHT, ANSWER = "the man of the house\n\nis here", "the man and the hat"


def scripts(tokenizer: Any, style: ThinkingStyle, inside: bool, end: str) -> dict[str, list[int]]:
    """Return what a model writes: as its template would have it, cut, and with odd ids."""

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, special=False)

    opening = "" if inside else style.openings[0]
    begin, close = ids(opening + THOUGHT), ids(style.cut)
    letters = [id for letter in ANSWER for id in ids(letter)]
    return {
        "plain": [*begin, *close, *ids(ANSWER), *ids(end)],
        "letters": [*begin, *close, *letters, *ids(end)],
        "cut": begin,
    }


def talk(source: str, folder: Path) -> dict[str, int]:
    """Hold conversations with a template; return how often something was checked."""
    eos = end_of(source)
    path, config, weights = write_random(folder, source, eos)
    model = mlx_stream.load(path, dtype="float32", keep_quantized=False)
    counts = {"turns": 0, "settled": 0}
    for window, system in ((600, None), (600, "Be brief."), (150, None)):
        chat = recorded(model, Trouble(), Scripted, system=system, window=window, max_tokens=60)
        style = chat.template.style
        assert style, "the template does not think"
        written = scripts(model.tokenizer, style, chat.template.thinks_first, eos)

        def act(steps: Any, script: str, told: int | None = None) -> None:
            Scripted.script = [*written[script]]  # noqa: B023
            for number, _ in enumerate(steps):
                if number == told:
                    steps.close()
                    break
            Scripted.script = []
            check(chat)  # noqa: B023

        def check(chat: Any) -> None:
            assert_well_formed(chat)
            twin = resumed(chat, Trouble())
            twin.tokens.steps_taken = [*chat.tokens.steps_taken]
            check_logits(twin, config, weights)
            counts["turns"] += 1

        for question in QUESTIONS:
            act(chat.reply(question), "plain")
            exchange = chat.exchanges[-1]
            assert (exchange.reply, exchange.thinking) == (ANSWER, THOUGHT), exchange
        act(chat.retry(), "letters")
        letters = model.tokenizer.encode("h", special=False)
        assert chat.exchanges[-1].reply == ANSWER and letters[0] in chat.exchanges[-1].reply_ids
        act(chat.reply("Cut"), "cut", told=3)
        assert chat.exchanges[-1].reply == "" and chat.exchanges[-1].thinking
        act(chat.edit("Edited"), "plain")
        chat.undo()
        check(chat)
        chat = resumed(chat, Trouble())
        check(chat)
        act(chat.retry(), "plain")
        act(chat.reply("x" * 40), "plain")
        counts["settled"] += chat.stats.settled
        assert chat.stats.evicted if window == 150 else not chat.stats.evicted
    return counts


def end_of(source: str) -> str:
    """Return the token that ends a reply in a template."""
    names = ("<|return|>", "<|im_end|>", "<turn|>", "<|end_of_text|>", "</s>")
    found = [name for name in names if name in source]
    return found[0] if found else NAMES.findall(source)[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("templates", nargs="+", type=Path)
    failed = 0
    for path in parser.parse_args().templates:
        with tempfile.TemporaryDirectory() as folder:
            try:
                found: dict[str, Any] = dict(talk(path.read_text("utf-8"), Path(folder)))
            except Exception as error:  # it is reported, and the next template is tried
                traceback.print_exc()
                found, failed = {"error": repr(error)[:300]}, 1
        print(json.dumps({"template": path.stem, **found}), flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
