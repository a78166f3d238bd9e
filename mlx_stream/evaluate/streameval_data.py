"""Numbered lines and questions about them, as StreamEval has them; knows text, no model.

StreamEval (StreamingLLM, arXiv 2309.17453, section 4.3) asks, every 10 lines of about 23 tokens,
for the fact of a line some lines back. Its data was never released; this generates such data. A
line, and a query about it, read

    Line 12: The violin at number 87 belongs to a baker, Ruth Adams.

    Question: Who owns the violin at number 87 in line 12?
    Answer: Ruth

There are ten surnames, drawn independently for each line and all candidates of every query, so a
model that cannot see the line is right once in ten. First names repeat every 101 lines.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from mlx_stream.errors import TextError, ValueRefused
from mlx_stream.evaluate.report import refuse_twice

FORMAT = "mlx_stream streameval"
VERSION = 1
QUERY_EVERY = 10
DISTANCES = (1, 5, 10, 20, 40, 80, 160)
HOW = (
    "A model reads the opening and the text of each line, in this order. A query is asked where it "
    "stands: the model reads its text, and its answer or a candidate would follow directly, space "
    "included. Then the model is taken back to before the query, so that no fact is told twice. "
    "1 line back is the line before the query."
)
OPENING = "Below is a list of things and the people they belong to.\n"


def words(text: str) -> list[str]:
    return text.split()


# No surname begins another, and each is common enough to be one token of most vocabularies.
SURNAMES = words("Adams Brown Clark Harris Jones Lewis Scott Smith Taylor Wilson")
JOBS = words("baker doctor farmer painter sailor singer soldier teacher")
THINGS = words("""
    anchor axe ball barn barrel basket bath bed bell belt bench bike boat book boot bowl box bridge
    broom brush bucket cabin cage candle cart chair clock coat coin comb cradle crate cup desk door
    drum easel engine fence flag flute frame gate globe glove hammer hat hive hook jug kettle key
    kite knife ladder lamp lantern lock map mirror nest net oar oven pan pen pencil piano pillow
    pipe plate plough pump quilt rake ring rope sail saw scarf shed shelf shoe sink sled spade
    spoon statue stool stove table tent towel tower train tray truck trunk tub van vase violin
    wagon wheel
""")
# 101 of them, a prime: whatever the stride, none comes again within 101 lines.
FIRST_NAMES = words("""
    Alice Anna Arthur Barbara Basil Beatrice Bernard Carol Cecil Charles Clara Colin Daniel David
    Deborah Diana Donald Dorothy Edgar Edith Edward Eleanor Ellen Emily Emma Eric Ernest Esther Eva
    Felix Fiona Florence Frances Frank Fred George Gerald Gloria Grace Harold Harry Helen Henry
    Herbert Hugh Ida Irene Isabel Ivan Jack Jacob James Jane Janet Jean Joan John Joseph Julia Karen
    Kate Laura Leonard Lily Linda Louis Lucy Mabel Margaret Maria Mark Martha Martin Mary Maud
    Michael Nancy Nathan Nora Norman Olive Oliver Oscar Paul Peter Philip Rachel Ralph Robert Roger
    Rosa Ruth Sally Samuel Sarah Simon Stephen Susan Sylvia Thomas Ursula
""")
STRIDE = 39


@dataclass(frozen=True)
class Line:
    """One fact, the question about it, and what follows the question, space included."""

    number: int
    text: str
    question: str
    answer: str


@dataclass(frozen=True)
class Query:
    """A question, asked once line `after` has been read.

    Attributes:
        number: of the query, from 1.
        about: the line asked about: 1 line back is line `after` itself.
        text: of the query; a candidate follows directly.
        answer: the candidate that is right.
    """

    number: int
    after: int
    about: int
    lines_back: int
    text: str
    answer: str
    candidates: tuple[str, ...]


@dataclass(frozen=True)
class StreamEvalData:
    """Lines 1, 2, 3, ... and the queries, in the order in which they are asked."""

    seed: int
    distances: tuple[int, ...]
    lines: list[Line]
    queries: list[Query]

    @property
    def text(self) -> str:
        """All that is read, without the queries."""
        return OPENING + "".join(line.text for line in self.lines)

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the objects of the data file: a header, then lines and queries as they come."""
        yield {
            "format": FORMAT,
            "version": VERSION,
            "seed": self.seed,
            "lines": len(self.lines),
            "distances": list(self.distances),
            "query_every": QUERY_EVERY,
            "how": HOW,
            "opening": OPENING,
        }
        at = {after: [*asked] for after, asked in groupby(self.queries, lambda one: one.after)}
        for line in self.lines:
            yield {"line": line.number, "text": line.text}
            for query in at.get(line.number, ()):
                yield {
                    "query": query.number,
                    "about": query.about,
                    "lines_back": query.lines_back,
                    "text": query.text,
                    "answer": query.answer,
                    "candidates": list(query.candidates),
                }

    def as_bytes(self) -> bytes:
        """Return the data file: JSON lines in ASCII, the same bytes everywhere."""
        return b"".join(json.dumps(one).encode("ascii") + b"\n" for one in self.records())


def make_data(seed: int, lines: int, distances: Sequence[int] = DISTANCES) -> StreamEvalData:
    """Generate lines, and after every tenth a query for each distance.

    All distances are asked at the same places, from the first one with a line so far back. Fewer
    lines of the same seed are the beginning of more.

    Worked example: with distances 5 and 20, after line 20 lines 16 and 1 are asked about, after
    line 30 lines 26 and 11.

    Args:
        distances: lines back; 1 is the line before the query.

    Raises:
        ValueRefused: a number out of range, or too few lines for one query.
    """
    check_data(seed, lines, distances)
    made = [make_line(seed, number) for number in range(1, lines + 1)]
    queries: list[Query] = []
    for after in range(QUERY_EVERY, lines + 1, QUERY_EVERY):
        if after < max(distances):
            continue
        for lines_back in distances:
            line = made[after - lines_back]  # line n is made[n - 1]
            queries.append(
                Query(
                    number=len(queries) + 1,
                    after=after,
                    about=line.number,
                    lines_back=lines_back,
                    text=line.question,
                    answer=line.answer,
                    candidates=tuple(f" {name}" for name in SURNAMES),
                )
            )
    return StreamEvalData(seed, tuple(distances), made, queries)


def check_data(seed: int, lines: int, distances: Sequence[int]) -> None:
    if not 0 <= seed < 2**64:
        raise ValueRefused(f"--seed must be from 0 to 2^64 - 1, not {seed}")
    if min(distances, default=0) < 1:
        raise ValueRefused(f"--distances must be at least 1 line back, not {[*distances]}")
    refuse_twice("--distances", [*distances])
    # The first query comes after this line.
    first = -(-max(distances) // QUERY_EVERY) * QUERY_EVERY
    if lines < first:
        raise ValueRefused(
            f"--lines must be at least {first} for a query {max(distances)} lines back, "
            f"not {lines}: give more, or smaller --distances"
        )


def make_line(seed: int, number: int) -> Line:
    """Return a line; it depends on the seed and its number alone."""
    turn = draw(seed, 0, "first name", len(FIRST_NAMES))
    first = FIRST_NAMES[(turn + STRIDE * number) % len(FIRST_NAMES)]
    thing, job, surname = (
        known[draw(seed, number, name, len(known))]
        for name, known in (("thing", THINGS), ("job", JOBS), ("surname", SURNAMES))
    )
    house = 10 + draw(seed, number, "house", 90)
    what = f"{thing} at number {house}"
    return Line(
        number,
        text=f"Line {number}: The {what} belongs to a {job}, {first} {surname}.\n",
        question=f"Question: Who owns the {what} in line {number}?\nAnswer: {first}",
        answer=f" {surname}",
    )


def draw(seed: int, number: int, what: str, count: int) -> int:
    """Return a whole number from 0 to count - 1: 64 bits of SHA-256 of "seed/number/what".

    `random` is not used: its results may change with Python's version.
    """
    digest = hashlib.sha256(f"{seed}/{number}/{what}".encode("ascii")).digest()
    return int.from_bytes(digest[:8], "big") % count


def write_data(data: StreamEvalData, path: Path) -> None:
    """Write the data file; raise TextError if it cannot be written."""
    try:
        path.write_bytes(data.as_bytes())
    except OSError as error:
        raise TextError(f"{path}: cannot be written: {error.strerror}") from error
