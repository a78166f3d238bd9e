"""The tokens a chat template writes around messages, and text cut so that it holds none of them.

Which they are is taken from what the template writes, not only from a tokenizer's `special`: many
fine-tunes declare theirs as ordinary added tokens.
"""

import re
from collections.abc import Iterator

from mlx_stream.errors import TemplateError
from mlx_stream.text.template.chat_template import ChatTemplate, assistant, user
from mlx_stream.text.tokenizer import BYTE_TOKEN, Tokenizer

# Marks where a text is cut before it is encoded: a Unicode noncharacter.
MARK = "\ufdd0"
# A character that no vocabulary has.
UNKNOWN = "\ufdd1"
# A message that templates leave as it is.
PROBE = "What is the first?"
# A control token's name in a vocabulary that does not list it as an added token.
BRACKETED = re.compile(r"[▁Ġ]?(?:<[^<>\s]+>|\[/?[A-Z_]+\])")


class ControlTokens:
    """Find the control tokens of a template, and cut texts so that they encode to none.

    Attributes:
        ids: what no message may encode to: special tokens, and those that the template writes.
        end_ids: what ends a reply: end tokens, special tokens, and those with which the template
            closes a reply or opens a turn. Otherwise the model could open a turn that no template
            renders.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate):
        self.tokenizer = tokenizer
        # What unknown characters are read as: often a special token, but it says nothing.
        self._unknown = frozenset(tokenizer.encode(UNKNOWN, special=False))
        parts = written_around(template)
        named = {id for id, text in tokenizer.added_texts.items() if text in template.source}
        special = tokenizer.eos_ids | tokenizer.special_ids
        # Of what follows a question only the first: behind it, a template may begin to think.
        asking, closing = (list(self._control(text)) for text in parts[1:3])
        self.end_ids = special | {*closing, *asking[:1]}
        self.ids = special | named.union(*map(self._control, parts))
        self._names = {ids: self._pattern(ids) for ids in (self.ids, self.end_ids)}
        self._edges = any(
            part.endswith(name[:cut]) or part.startswith(name[cut:])
            for name in map(tokenizer.text_of, self.ids)
            for cut in range(1, len(name))
            for part in parts
            if part
        )

    def escape(self, text: str, reply: bool = False) -> str:
        """Return a text in which marks split whatever would be read as a control token.

        A character that is read as one all by itself is left out. A reply may hold what the
        template writes inside replies, such as a mark of thinking.
        """
        ids = self.end_ids if reply else self.ids
        text, found = text.replace(MARK, ""), list[str]()
        cuts = [match.start() + 1 for match in self._names[ids].finditer(text)]
        waiting = [text[i:j] for i, j in zip([0, *cuts], [*cuts, None], strict=True)][::-1]
        while waiting:  # names are not all: normalizers map other texts to control tokens
            piece = waiting.pop()
            if spans := self.tokenizer.find(piece, ids - self._unknown):
                waiting += cut(piece, spans)[::-1]
            elif piece:
                found.append(piece)
        return MARK.join(["", *found, ""] if self._edges else found)

    def _pattern(self, ids: frozenset[int]) -> re.Pattern[str]:
        names = [name for name in map(self.tokenizer.text_of, ids) if len(name) > 1]
        return re.compile(f"(?={'|'.join(map(re.escape, names)) or '(?!)'})")

    def _control(self, text: str) -> Iterator[int]:
        """Yield the ids of a template's text that stand for no ordinary text."""
        added, special = self.tokenizer.added_texts, self.tokenizer.special_ids
        for id in self.tokenizer.encode(text, special=False):
            name = self.tokenizer.text_of(id)
            bracketed = BRACKETED.fullmatch(name) and not BYTE_TOKEN.fullmatch(name)
            if id not in self._unknown and (id in special or id in added or bracketed):
                yield id


def written_around(template: ChatTemplate) -> list[str]:
    """Return a template's own texts: before a question, behind it, behind the reply, at the end.

    Then, if it has a system role, those around a system prompt.
    """
    messages = [user(PROBE), assistant(PROBE), user(PROBE)]
    parts = template.render(messages, reply=True).split(PROBE)
    if len(parts) != 4:  # it alters messages, or writes one of them twice
        parts = ["", "", template.closing, template.turn(PROBE)]
    try:
        return [*parts, *template.opening(PROBE, PROBE).split(PROBE)]
    except TemplateError:
        return parts


def cut(text: str, spans: list[tuple[int, int]]) -> list[str]:
    """Return a text in pieces: cut within each span, without a span of a single character."""
    pieces, at = [], 0
    for begin, end in spans:
        # In the middle, so that a text that is read as one token is cut to nothing in few steps.
        middle = begin if end - begin < 2 else (begin + end) // 2
        pieces.append(text[at:middle])
        at = max(at, middle + (end - begin < 2))
    return [*pieces, text[at:]]
