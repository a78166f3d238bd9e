"""Decodes bytes as text, and decides where to split them; independent of sources."""

import codecs
import re

from mlx_stream.program.notices import Notify
from mlx_stream_assistant.errors import AssistantError

# Bytes per read.
CHUNK = 4096
# The maximum share of unreadable characters at the start of a text file. Western Latin-1 text is
# below this; other encodings and binary files are above it.
MOST_UNREADABLE = 0.3
REPLACEMENT = "\ufffd"
# Characters that do not occur in text; U+001B is not included, because logs use it for colours.
CONTROL = re.compile("[\x01-\x06\x0e-\x1a\x1c-\x1f\x7f]")
# Some programs put this at the start of a file; it is not part of the text.
BYTE_ORDER_MARK = "\ufeff"
UTF_16 = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE


class NotText(AssistantError):
    """A file is not text."""


class TextDecoder:
    """Decodes one or more files; reports once per file if part of it is not text."""

    def __init__(self, tell: Notify):
        self._tell, self._told = tell, set[str]()

    def decode(self, data: bytes, name: str, at: int = 0) -> str:
        """Return bytes from position `at` of a file as text, even if they are not valid UTF-8.

        Invalid bytes become U+FFFD. Zero bytes are dropped: they are left by a power failure, or
        when a file is truncated while another program is writing to it. At position 0, a byte order
        mark is dropped too.
        """
        if (odd := first_odd_byte(data)) is not None:
            self.tell_once(name, at + odd)
        text = data.decode("utf-8", "replace").replace("\0", "")
        return text if at else text.removeprefix(BYTE_ORDER_MARK)

    def tell_once(self, name: str, at: int) -> None:
        """Report a byte that is not text, unless one has already been reported for this file."""
        if name not in self._told:
            self._told.add(name)
            self._tell(
                f"{name}: byte {at:,} is not UTF-8 text: such bytes are read as U+FFFD, and NUL "
                "bytes are dropped"
            )


def refuse_binary(first: bytes, name: str, whole: bool) -> None:
    """Raise NotText if the start of a file shows that it is not UTF-8 text.

    If `first` is not a `whole` chunk or file, its characters are not checked, because a first line
    alone may be unusual.
    """
    if first.startswith(UTF_16):
        raise NotText(f"{name}: is UTF-16: convert it, for instance with iconv -f UTF-16 -t UTF-8")
    if not whole:
        return
    text = first.decode("utf-8", "replace").replace("\0", "")
    unreadable = text.count(REPLACEMENT) - first.count(REPLACEMENT.encode())
    if unreadable + len(CONTROL.findall(text)) > MOST_UNREADABLE * len(text):
        raise NotText(
            f"{name}: is not UTF-8 text: if it is text, convert it, for instance with "
            "iconv -t UTF-8"
        )


def first_odd_byte(data: bytes) -> int | None:
    """Return the offset of the first byte that is zero or not valid UTF-8, or None.

    >>> first_odd_byte(b"a\\xff\\0"), first_odd_byte(b"a\\0\\xff"), first_odd_byte(b"a")
    (1, 1, None)
    """
    zero = data.find(0)
    try:
        (data if zero < 0 else data[:zero]).decode()
    except UnicodeDecodeError as error:
        return error.start
    return None if zero < 0 else zero


def line_end(data: bytes, more: bool, growing: bool) -> int:
    """Return how many new bytes to take: whole lines, else words, else characters.

    `more` means that more bytes already follow; `growing`, that the file has grown since the last
    check.
    """
    line = data.rfind(b"\n") + 1
    if more:
        return line or data.rfind(b" ") + 1 or whole_characters(data)
    return line if growing else whole_characters(data)


def whole_characters(data: bytes) -> int:
    """Return the number of leading bytes that form complete UTF-8 characters.

    >>> whole_characters("a€".encode()), whole_characters("a€".encode()[:3])
    (4, 1)
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data[-4:])
    return len(data) - len(decoder.getstate()[0])
