"""Finds the tokens a chat template writes around messages, and splits text so it has none of them.

They are taken from the template's output, not only from the tokenizer's special tokens: many
fine-tunes declare theirs as ordinary added tokens.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise

from mlx_stream.errors import TemplateError
from mlx_stream.text.template.chat_template import ChatTemplate, assistant, user
from mlx_stream.text.tokenizer import BYTE_TOKEN, Tokenizer

# Marks where a text is split before it is encoded: a Unicode noncharacter.
MARK = "\ufdd0"
# A character that no vocabulary contains.
UNKNOWN = "\ufdd1"
# A message that templates leave unchanged.
PROBE = "What is the first?"
# A control token's name in a vocabulary that does not list it as an added token.
BRACKETED = re.compile(r"[▁Ġ]?(?:<[^<>\s]+>|\[/?[A-Z_]+\])")


class ControlTokens:
    """Finds the control tokens of a template, and splits texts so that they encode to none of them.

    Attributes:
        ids: tokens that no message may encode to: special tokens, and those that the template
            writes.
        end_ids: tokens that end a reply: end tokens, special tokens, and those that the template
            uses to close a reply or open a turn. Without those, the model could open a turn
            that no template renders.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate):
        self.tokenizer = tokenizer
        # What unknown characters encode to: often a special token, but a harmless one.
        self._unknown = frozenset(tokenizer.encode(UNKNOWN, special=False))
        parts = written_around(template)
        special = tokenizer.eos_ids | tokenizer.special_ids
        # Only the first token after a question counts: a template may open the thinking after it.
        asking, closing = (list(self._names(text)) for text in parts[1:3])
        self.end_ids = special | {*closing, *asking[:1]}
        written = (id for text in parts for id in self._control(text))
        self.ids = special.union(written, self._names(template.source))
        self._beside = has_part_at_an_end(list(map(tokenizer.text_of, self.ids)), parts)

    def escape(self, text: str, reply: bool = False) -> str:
        """Return the text with marks that split anything that would be read as a control token.

        A single character that would be read as a control token is dropped. A reply may contain
        what the template writes inside replies, such as thinking marks.
        """
        ids = (self.end_ids if reply else self.ids) - self._unknown
        find = cache(lambda piece: self.tokenizer.find(piece, ids))  # many pieces are identical
        waiting, found = [text.replace(MARK, "")], list[str]()
        while waiting:  # comparing names would miss texts that normalizers map to control tokens
            piece = waiting.pop()
            if spans := find(piece):
                waiting += cut(piece, spans)[::-1]
            elif piece:
                found.append(piece)
        return MARK.join(["", *found, ""] if self._beside else found)

    def _control(self, text: str) -> Iterator[int]:
        """Yield the ids in a template's text that do not stand for ordinary text."""
        added, special = self.tokenizer.added_texts, self.tokenizer.special_ids
        for id in self.tokenizer.encode(text, special=False):
            name = self.tokenizer.text_of(id)
            bracketed = BRACKETED.fullmatch(name) and not BYTE_TOKEN.fullmatch(name)
            if id not in self._unknown and (id in special or id in added or bracketed):
                yield id

    def _names(self, text: str) -> Iterator[int]:
        """Yield the same ids, except for words, which have other uses in a template or a reply."""
        return (id for id in self._control(text) if not self.tokenizer.text_of(id).isalnum())


def written_around(template: ChatTemplate) -> list[str]:
    """Return a template's own texts: before a question, after it, after the reply, and at the end.

    If the template has a system role, the texts around a system prompt follow.
    """
    messages = [user(PROBE), assistant(PROBE), user(PROBE)]
    parts = template.render(messages, reply=True).split(PROBE)
    if len(parts) != 4:  # the template alters messages, or repeats one
        parts = ["", "", template.closing, template.turn(PROBE)]
    try:
        return [*parts, *template.opening(PROBE, PROBE).split(PROBE)]
    except TemplateError:
        return parts


def has_part_at_an_end(names: Sequence[str], texts: Sequence[str]) -> bool:
    """Return whether a text ends with the start of a name, or starts with the end of one."""
    longest = max(map(len, names), default=0)
    backwards = [name[::-1] for name in names]
    for ordered, ends in (
        (sorted(names), [text[-longest:] for text in texts]),
        (sorted(backwards), [text[:longest][::-1] for text in texts]),
    ):
        for part in (end[at:] for end in ends for at in range(len(end))):
            following = bisect_right(ordered, part)
            if following < len(ordered) and ordered[following].startswith(part):
                return True
    return False


def cut(text: str, spans: Sequence[tuple[int, int]]) -> list[str]:
    """Split a text within each span into shorter pieces; a single character yields no pieces.

    A span of one character may stand for a longer run that a normalizer replaced, so the text
    before and after it is split too.
    """
    if len(text) == 1:
        return []
    places = {0, len(text)}
    for begin, end in spans:
        single = {begin // 2, begin, begin + 1, (begin + 1 + len(text)) // 2}
        places |= {(begin + end) // 2} if end - begin > 1 else single
    return [text[i:j] for i, j in pairwise(sorted(places)) if i < j <= len(text)]
