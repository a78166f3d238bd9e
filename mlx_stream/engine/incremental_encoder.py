"""Text that arrives in pieces -> ids, split between words; independent of streams.

The ids do not depend on how the text was split. A word is encoded only once its end is known, and
each piece is encoded together with the words before it, so a tokenizer that puts a space before the
first word of its input adds none here.
"""

import re

from mlx_stream.chat.prompts import PromptBuilder

# Where every tokenizer has a token boundary: before a single space between two words, and after a
# single newline between two. Within a blank line, many tokenizers merge the last character with
# what follows, so the ids depend on it.
BETWEEN = re.compile(r"(?<=\S) (?=\S)|(?<=\S\n)(?=\S)")
LONGEST_WORD = 1_000  # characters; longer words (or a script without spaces) are split anywhere
CONTEXT = 200
BEFORE_A_QUESTION = "\n\n"


class IncrementalEncoder:
    """Encode the text of an open turn as it arrives.

    Attributes:
        context: the last words that were encoded, with special tokens escaped; at first, the
            template's text that precedes the turn's text.
        lead: what the template puts before the first word, until that word is encoded.
        pending: text whose ids may still change depending on what follows.
    """

    def __init__(self, prompts: PromptBuilder, context: str, lead: str = "", pending: str = ""):
        self.prompts, self.context, self.lead, self.pending = prompts, context, lead, pending
        self.begun = False  # whether any of the turn's text has been encoded

    def add(self, text: str) -> list[int]:
        """Add text, and return the ids that are now certain."""
        self.pending += text
        cuts = [match.start() for match in BETWEEN.finditer(self.pending)]
        cut = cuts[-1] if cuts else 0
        if len(self.pending) - cut > LONGEST_WORD:
            cut = len(self.pending) - 1
        return self._take(cut)

    def flush(self) -> list[int]:
        """Return the ids of the pending text, as if nothing followed it."""
        return self._take(len(self.pending))

    def end_turn(self, held: str, question: str, closing: str) -> list[int]:
        """Return the ids that end the turn: a question and the template's text. Changes nothing.

        Args:
            held: the part of the pending text to put before the question: all of it, or "".
        """
        gap = BEFORE_A_QUESTION if self.begun or held else ""
        return self._after(
            self.lead + self.prompts.escape_special_tokens(held + gap + question) + closing
        )

    def restart(self, context: str, lead: str) -> None:
        """Start a new turn; the pending text belongs to it."""
        self.context, self.lead, self.begun = context, lead, False

    def _take(self, cut: int) -> list[int]:
        if not cut:
            return []
        piece = self.lead + self.prompts.escape_special_tokens(self.pending[:cut])
        ids = self._after(piece)  # before any change: if it raises, no text is lost
        self.context, self.pending = last_words(self.context + piece), self.pending[cut:]
        self.lead, self.begun = "", True
        return ids

    def _after(self, text: str) -> list[int]:
        if self.context:
            before, whole = (self.prompts.encode(self.context + more) for more in ("", text))
            if whole[: len(before)] == before:
                return whole[len(before) :]
        # There is no context, or the tokenizer has no boundary here and the text must be split.
        return self.prompts.encode(text, behind_text=True)


def last_words(text: str) -> str:
    """Return a short part at the end of a text, starting at a word."""
    if len(text) <= CONTEXT and not BETWEEN.search(text):
        return text
    cuts = [match.start() for match in BETWEEN.finditer(text, max(0, len(text) - CONTEXT))]
    return text[cuts[-1] :] if cuts else ""
