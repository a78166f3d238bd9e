"""Bytes -> text: where to cut the bytes, and whether they are text; independent of sources."""

import codecs

from mlx_stream_assistant.errors import AssistantError

# Bytes read at once.
CHUNK = 4096
# The share of a text's characters that may be undecodable: logs have an odd byte now and then.
MOST_UNREADABLE = 0.1
REPLACEMENT = "\ufffd"
# Some programs put it at the start of a file; it is not text.
BYTE_ORDER_MARK = "\ufeff"


class NotText(AssistantError):
    """Bytes are not text."""


def line_end(data: bytes, more: bool, growing: bool) -> int:
    """Return how many new bytes to take: whole lines, else words, else characters.

    `more` bytes follow them already, or the file was `growing` since the last look.
    """
    line = data.rfind(b"\n") + 1
    if more:
        return line or data.rfind(b" ") + 1 or whole_characters(data)
    return line if growing else whole_characters(data)


def whole_characters(data: bytes) -> int:
    """Return how many leading bytes end with a whole UTF-8 character.

    >>> whole_characters("a€".encode()), whole_characters("a€".encode()[:3])
    (4, 1)
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data[-4:])
    return len(data) - len(decoder.getstate()[0])


def decode(data: bytes, name: str, at: int = 0) -> str:
    """Return the bytes `at` a position of a source as text; what is not UTF-8 becomes U+FFFD.

    At 0 a byte order mark is dropped. Raises NotText for a byte 0, or if too much is not UTF-8.
    """
    if (zero := data.find(0)) >= 0:
        raise NotText(f"{name}: is not text: byte {at + zero:,} is 0")
    text = data.decode("utf-8", "replace")
    unreadable = text.count(REPLACEMENT) - data.count(REPLACEMENT.encode())
    if unreadable > max(1, MOST_UNREADABLE * len(text)):
        raise NotText(
            f"{name}: is not UTF-8 (at byte {at:,}): convert it, for instance with iconv -t UTF-8"
        )
    return text if at else text.removeprefix(BYTE_ORDER_MARK)
