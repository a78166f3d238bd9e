"""Bounds the cost of an untrusted regular expression before the library compiles it.

The library's engine tries every way to match, so without a bound, a short pattern could take years.
A pattern is accepted only if matching takes time proportional to the length of the text:

- In a branch or a group, nothing that can fail follows an unbounded repetition, so all text
  that was read is matched, and is read only once: `\\p{L}+`, `(?:a b*)+`, but not `a*b`.
- A branch may break that rule if the next branch that obeys it is certain to match what the
  failed branch read: `\\s*\\n|\\s+`, but not `\\s*\\n` alone.
- Two kinds of published patterns break the rule anyway, rereading a run of whitespace or digits
  starting at each of its characters. They are accepted where the length of runs can be limited.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MAX_REGEX = 4_000  # characters
MAX_TIMES = 100
MAX_DEPTH = 4
# Steps per character of a text; each takes 5 ns.
MAX_COST = 1_000
SLOW_COST = 400  # so that a file can have at most two slow patterns

ESCAPE = r"\\(?:[sSdDwWhHrntfvae]|[^A-Za-z0-9])"
# One character; a character class may contain another class.
ATOM = re.compile(
    rf"\\[pPxu]\{{[^{{}}]*\}}|{ESCAPE}|\[(?:\\.|[^\[\]\\]|\[(?:\\.|[^\[\]\\])*\])*\]"
    r"|[^\\()\[\]{}*+?|^$]",
    re.DOTALL,
)
# Zero-width: anchors and word boundaries.
PLACE = re.compile(r"\\[bBAzZ]|\^|\$")
GROUP = re.compile(r"\((?:\?(?:i?:|>|[=!]))?")
TIMES = re.compile(r"([*+?]|\{\d+(?:,\d*)?\}|\{,\d+\}|)((?<=[*+?}])\+|)")
# Branches that match a whole run, or all but its end, where the lookahead succeeds immediately.
WHOLE_RUN = re.compile(r"\\s\+\(\?!\\S\)|\(\?:\\r\?\\n\)\+\(\?!\\r\?\\n\)")
DIGIT = r"(?:\\d|\\p\{Nd?\}|\[0-9\])"
# `\s+$`, and digits grouped in threes from the right: `\d{1,3}(?=(?:\d{3})*\b)`,
# `(?=(\d{3})+(?!\d))`.
SLOW = re.compile(
    rf"\\s\+\+?\$"
    rf"|(?:{DIGIT}\{{1,3\}})?\(\?=\((?:\?:)?{DIGIT}\{{3\}}\)[*+](?:\\b|\$|\(\?!{DIGIT}\))\)"
)


@dataclass(frozen=True)
class Item:
    """A part of a branch, and how often it may be repeated.

    Attributes:
        text: as written in the pattern, without the repetition.
        required: whether the branch fails if the text does not contain it.
        endless: whether it, or something in it, is repeated without bound.
        ways: the number of ways it can match a text, not counting those of unbounded parts.
        length: the maximum number of characters it reads, with one repetition of unbounded parts.
    """

    text: str
    required: bool
    endless: bool
    ways: int
    length: int


@dataclass(frozen=True)
class Branch:
    text: str
    items: Sequence[Item]

    @property
    def fails_late(self) -> bool:
        """Whether something required follows an unbounded part."""
        endless = [number for number, item in enumerate(self.items) if item.endless]
        late = endless and any(item.required for item in self.items[endless[0] + 1 :])
        return bool(late) and not WHOLE_RUN.fullmatch(self.text)

    @property
    def ways(self) -> int:
        return math.prod(item.ways for item in self.items)

    @property
    def length(self) -> int:
        return sum(item.length for item in self.items)

    @property
    def cost(self) -> int:
        """The maximum number of steps per character.

        What follows the last required part is tried only once.
        """
        last = max((n for n, item in enumerate(self.items) if item.required), default=0)
        return math.prod(item.ways for item in self.items[:last]) * self.length


def check_regex(pattern: object) -> int:
    """Check a pattern and return the maximum number of steps it takes per character of a text.

    Raises:
        ValueError: the pattern could take more than linear time, or is not supported.
    """
    if not isinstance(pattern, str) or not 0 < len(pattern) <= MAX_REGEX:
        raise ValueError(f"a pattern is not a string of 1 to {MAX_REGEX} characters")
    branches, at = parse(pattern, 0, 0)
    if at < len(pattern):
        raise refused(pattern, at)
    for number, branch in enumerate(branches):
        if branch.fails_late and not is_made_up_for(branch, branches[number + 1 :]):
            raise ValueError(
                f"the pattern {pattern[:60]!r} could backtrack endlessly in {branch.text[:40]!r}"
            )
    return sum(branch.cost for branch in branches)


def is_slow(pattern: object) -> bool:
    """Return whether a step's pattern reads a run of whitespace or digits many times."""
    regex = pattern.get("Regex") if isinstance(pattern, Mapping) else None
    return isinstance(regex, str) and bool(SLOW.fullmatch(regex))


def refused(pattern: str, at: int) -> ValueError:
    return ValueError(f"the pattern {pattern[:60]!r} is not supported at {pattern[at:][:20]!r}")


def is_made_up_for(branch: Branch, later: Sequence[Branch]) -> bool:
    """Return whether the next branch that does not fail late matches what this one had read.

    It must begin in the same way, repeating the same single-character item, so that both branches
    stop where that run ends.
    """
    count = next(number for number, item in enumerate(branch.items) if item.endless)
    run, rest = branch.items[count], Branch("", branch.items[count + 1 :])
    other = next((branch for branch in later if not branch.fails_late), None)
    if other is None or rest.fails_late or not ATOM.fullmatch(run.text):
        return False
    again = other.items[count : count + 1]
    return (
        branch.items[:count] == other.items[:count]
        and bool(again)
        and again[0].endless
        and again[0].text == run.text
    )


def parse(pattern: str, at: int, depth: int) -> tuple[list[Branch], int]:
    """Return the branches of a pattern, or of a group, and where it ends."""
    branches: list[Branch] = []
    begin, items = at, list[Item]()
    while True:
        if at == len(pattern) or pattern[at] in "|)":
            branches.append(Branch(pattern[begin:at], items))
            if at == len(pattern) or pattern[at] == ")":
                return branches, at
            begin, items, at = at + 1, [], at + 1
        else:
            item, at = parse_item(pattern, at, depth)
            items.append(item)


def parse_item(pattern: str, begin: int, depth: int) -> tuple[Item, int]:
    """Return an item with its repetition, and where it ends."""
    group, atom = GROUP.match(pattern, begin), ATOM.match(pattern, begin)
    place, inner, at = PLACE.match(pattern, begin), [Branch("", [])], begin
    if group:
        inner, at = parse(pattern, group.end(), depth + 1)
        at += 1
        looks = group[0][-1] in "=!"
        endless = any(item.endless for branch in inner for item in branch.items)
        late = any(branch.fails_late for branch in inner)
        if at > len(pattern) or depth == MAX_DEPTH or late or (looks and endless):
            raise refused(pattern, begin)
    elif found := atom or place:
        at, looks, endless = found.end(), found is place, False
    else:
        raise refused(pattern, begin)
    times = TIMES.match(pattern, at)
    assert times
    # `a{1,3}+` is a run of runs: unlike a run of single characters, it can be divided in many ways.
    text = pattern[begin : times.end(1) if times[1].startswith("{") and times[2] else at]
    least, most = bounds(*times.groups())
    many = max(least, most or 0) > MAX_TIMES or (endless and least > 1)
    if many or (looks and times[0]):
        raise refused(pattern, at)
    ways, length = sum(branch.ways for branch in inner), max(branch.length for branch in inner)
    most_counted = most or 1
    return Item(
        text,
        required=least > 0,
        endless=endless or most is None,
        ways=min(ways, MAX_COST) ** most_counted * max(1, most_counted - least + 1),
        length=max(1, length) * most_counted,
    ), times.end()


def bounds(times: str, again: str) -> tuple[int, int | None]:
    """Return the minimum and maximum number of repetitions; None means unbounded.

    A plus after `*`, `+` or `?` makes it possessive. After `{1,3}`, it is a further repetition.
    """
    if not times.startswith("{"):
        return {"": (1, 1), "?": (0, 1), "*": (0, None), "+": (1, None)}[times]
    least, comma, most = times[1:-1].partition(",")
    low, high = int(least[:9] or 0), int(most[:9]) if most else None
    if again:
        return low, None
    return low, (high if comma else low)
