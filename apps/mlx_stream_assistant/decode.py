"""Bytes of a file or pipe -> text that a person wrote; knows no source."""

from mlx_stream_assistant.paths import AssistantError

# Of the characters of a text, so many may be undecodable: a log has an odd byte now and then.
MOST_UNREADABLE = 0.1
REPLACEMENT = "\ufffd"


class NotText(AssistantError):
    """Bytes are not text."""


def whole_characters(data: bytes) -> int:
    """Return how many leading bytes end with a whole UTF-8 character.

    >>> whole_characters("a€".encode()), whole_characters("a€".encode()[:3])
    (4, 1)
    """
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if byte >= 0xC0:  # the first byte of a character of 2 to 4
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) - back if back < length else len(data)
        if byte < 0x80:
            break
    return len(data)


def decode(data: bytes, name: str, at: int = 0) -> str:
    """Return bytes as text; what is not UTF-8 becomes U+FFFD.

    Args:
        name: of the file, for the error.
        at: where in it the bytes are.

    Raises:
        NotText: there is a byte 0, or too much is not UTF-8.
    """
    if (zero := data.find(0)) >= 0:
        raise NotText(f"{name}: is not text: byte {at + zero:,} is 0")
    text = data.decode("utf-8", "replace")
    unreadable = text.count(REPLACEMENT) - data.count(REPLACEMENT.encode())
    if unreadable > max(1, MOST_UNREADABLE * len(text)):
        raise NotText(
            f"{name}: is not UTF-8 (from byte {at:,} on): convert it, for instance with "
            "iconv -t UTF-8"
        )
    return text
