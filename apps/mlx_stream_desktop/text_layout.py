"""Prepares untrusted text for labels, and breaks it into lines; measures nothing itself."""

from collections.abc import Callable, Iterator

LONGEST_SHOWN = 20_000
WORD_JOINER = "\N{WORD JOINER}"


def visible(text: str) -> str:
    """Return text as it is shown: truncated, with tabs as spaces, without control characters."""
    if len(text) > LONGEST_SHOWN:
        text = f"{text[:LONGEST_SHOWN]}\n(the first {LONGEST_SHOWN:,} of {len(text):,} characters)"
    text = text.replace("\r\n", "\n").replace("\t", "    ")
    return "".join(c for c in text if c == "\n" or (c >= " " and not "\x7f" <= c <= "\x9f"))


def escape_markup(text: str) -> str:
    """Escape visible text so that a label never treats it as markup.

    A Qt label treats its text as HTML if the first line contains a tag. A word joiner after `<`
    prevents that.
    """
    return text.replace("<", f"<{WORD_JOINER}").replace("&", f"&{WORD_JOINER}")


def wrap(text: str, width: float, measure: Callable[[str], float]) -> str:
    """Break lines so that each is at most `width` wide; a longer word is split.

    If each character is 1 wide, "one two three" at width 7 becomes "one two" and "three".
    """
    return "\n".join(part for line in text.split("\n") for part in lines_of(line, width, measure))


def lines_of(line: str, width: float, measure: Callable[[str], float]) -> Iterator[str]:
    rest = line.lstrip(" ")
    words = rest.rstrip(" ").split(" ")
    words[0] = line[: len(line) - len(rest)] + words[0]
    now, used, space = "", 0.0, measure(" ")
    for word in words:
        needed = measure(word)
        if now and used + space + needed <= width:
            now, used = f"{now} {word}", used + space + needed
            continue
        if now:
            yield now
        *full, now = break_word(word, width, measure) if needed > width else [word]
        yield from full
        used = measure(now)
    yield now


def break_word(word: str, width: float, measure: Callable[[str], float]) -> list[str]:
    """Split a word into parts of at most `width`, each with at least one character."""
    parts, used = [""], 0.0
    for char in word:
        wide = measure(char)
        if parts[-1] and used + wide > width:
            parts.append("")
            used = 0.0
        parts[-1], used = parts[-1] + char, used + wide
    return parts
