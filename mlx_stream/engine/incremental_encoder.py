"""Text that comes in pieces -> ids, cut between words; knows no stream.

However a text is cut into pieces, its ids are those of the whole: nothing is encoded before it is
known where its last word ends, and each piece is encoded behind the words before it, so that a
tokenizer which puts a space before the first word of what it is given puts none here.
"""

import re

from mlx_stream.chat.prompts import PromptBuilder

# Between words, wherever a tokenizer may draw the line: before the only space between two words;
# after the only line end between two. Of a blank line many take the last character with what
# follows, so what they see of it depends on whether something does.
BETWEEN = re.compile(r"(?<=\S) (?=\S)|(?<=\S\n)(?=\S)")
LONGEST_WORD = 1_000  # characters; longer ones (or a script without spaces) are cut anywhere
CONTEXT = 200
BEFORE_A_QUESTION = "\n\n"


class IncrementalEncoder:
    """Text that was added to a turn and how far it is encoded.

    Attributes:
        context: the last words that were encoded, special tokens escaped; at first those of the
            template before the turn's text.
        lead: what the template puts before the first word, until it is encoded.
        pending: text that more text may still change.
    """

    def __init__(self, prompts: PromptBuilder, context: str, lead: str = "", pending: str = ""):
        self.prompts, self.context, self.lead, self.pending = prompts, context, lead, pending
        self.begun = False  # whether anything of the turn's text is encoded

    def add(self, text: str) -> list[int]:
        """Return the ids of the words that are certain now."""
        self.pending += text
        cuts = [match.start() for match in BETWEEN.finditer(self.pending)]
        cut = cuts[-1] if cuts else 0
        if len(self.pending) - cut > LONGEST_WORD:
            cut = len(self.pending) - 1
        return self._take(cut)

    def flush(self) -> list[int]:
        """Return the ids of what was held back, as if nothing followed it."""
        return self._take(len(self.pending))

    def end_turn(self, held: str, question: str, closing: str) -> list[int]:
        """Return the ids of a turn's end: a question and a template's words; changes nothing.

        Args:
            held: what is taken before it of the text held back: all, or nothing.
        """
        gap = BEFORE_A_QUESTION if self.begun or held else ""
        return self._after(
            self.lead + self.prompts.escape_special_tokens(held + gap + question) + closing
        )

    def restart(self, context: str, lead: str) -> None:
        """Go on in another turn; what is held back is still to come."""
        self.context, self.lead, self.begun = context, lead, False

    def _take(self, cut: int) -> list[int]:
        if not cut:
            return []
        piece = self.lead + self.prompts.escape_special_tokens(self.pending[:cut])
        ids = self._after(piece)  # before anything changes: if it fails, no text is lost
        self.context, self.pending = last_words(self.context + piece), self.pending[cut:]
        self.lead, self.begun = "", True
        return ids

    def _after(self, text: str) -> list[int]:
        if self.context:
            before, whole = (self.prompts.encode(self.context + more) for more in ("", text))
            if whole[: len(before)] == before:
                return whole[len(before) :]
        # There is no word before it, or the tokenizer joins what is apart here: it has to be cut.
        return self.prompts.encode(text, behind_text=True)


def last_words(text: str) -> str:
    """Return a short end of a text that begins with a word."""
    if len(text) <= CONTEXT and not BETWEEN.search(text):
        return text
    cuts = [match.start() for match in BETWEEN.finditer(text, max(0, len(text) - CONTEXT))]
    return text[cuts[-1] :] if cuts else ""
