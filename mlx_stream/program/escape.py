"""Untrusted text -> text that is safe on a terminal; independent of terminals and models.

A terminal obeys escapes: they move the cursor, change the window's title, fill the clipboard. It
also hides characters without a glyph, and can show text backwards. Both kinds are shown as Python
writes them: ESC as `\\x1b`, a right-to-left override as `\\u202e`.
"""

import re

# All control and format characters of Unicode 17 except line feed and tab; the joiners U+200C and
# U+200D, which emoji and scripts need; and Arabic, Syriac and Kaithi signs that have a shape.
# Variation selectors are marks, not format characters.
HARMFUL = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0, DEL, C1
    "\xad"  # soft hyphen
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # bidi marks, embeddings, overrides, isolates
    "\u2028\u2029"  # line and paragraph separator
    "\u180e\u200b\u2060-\u2065\u206a-\u206f\ufeff"  # without width
    "\ufff0-\ufffb"  # interlinear annotation
    "\ud800-\udfff"  # surrogates: no text
    "\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"  # layout of rare scripts
    "\U000e0000-\U000e00ff\U000e01f0-\U000e0fff"  # tags; all but the selectors between
    "]"
)


class TerminalEscaper:
    """Escape a text that comes in pieces; the results join to `escape` of the whole."""

    def __init__(self) -> None:
        self._held = ""

    def add(self, text: str) -> str:
        """Return what can be shown of a piece. A \\r at its end is held back: \\n may follow."""
        text = self._held + text
        self._held = "\r" if text.endswith("\r") else ""
        return escape(text.removesuffix("\r"))

    def flush(self) -> str:
        """Return what was held back, at the end of the text."""
        held, self._held = self._held, ""
        return escape(held)


def escape(text: str) -> str:
    """Return a whole text with control and invisible characters as escapes, and \\r\\n as \\n."""
    return HARMFUL.sub(escape_character, text.replace("\r\n", "\n"))


def escape_character(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")
