"""Makes untrusted text safe to show on a terminal; independent of terminals and models.

A terminal obeys escape sequences, which can move the cursor, change the window's title or fill the
clipboard. It also hides characters without a glyph and can show text backwards. Both kinds of
characters are shown as Python escapes: ESC as `\\x1b`, a right-to-left override as `\\u202e`.
"""

import re

# All control and format characters of Unicode 17 except line feed and tab; the joiners U+200C and
# U+200D, which emoji and some scripts need; and Arabic, Syriac and Kaithi signs that have a glyph.
# Variation selectors are marks, not format characters.
HARMFUL = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0, DEL, C1
    "\xad"  # soft hyphen
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # bidi marks, embeddings, overrides, isolates
    "\u2028\u2029"  # line and paragraph separator
    "\u180e\u200b\u2060-\u2065\u206a-\u206f\ufeff"  # zero-width characters
    "\ufff0-\ufffb"  # interlinear annotation
    "\ud800-\udfff"  # surrogates, which are not text
    "\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"  # layout of rare scripts
    "\U000e0000-\U000e00ff\U000e01f0-\U000e0fff"  # tags, but not the variation selectors in between
    "]"
)


class TerminalEscaper:
    """Escape text that arrives in pieces; the joined results equal `escape` of the whole text."""

    def __init__(self) -> None:
        self._held = ""

    def add(self, text: str) -> str:
        """Return the part that can be shown. A \\r at the end is held back: \\n may follow."""
        text = self._held + text
        self._held = "\r" if text.endswith("\r") else ""
        return escape(text.removesuffix("\r"))

    def flush(self) -> str:
        """At the end of the text, return what was held back."""
        held, self._held = self._held, ""
        return escape(held)


def escape(text: str) -> str:
    """Return a whole text with control and invisible characters as escapes, and \\r\\n as \\n."""
    return HARMFUL.sub(escape_character, text.replace("\r\n", "\n"))


def escape_character(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")
