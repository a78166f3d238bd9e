"""Makes numbered lines and questions about them, as in StreamEval; handles text, not models.

StreamEval (StreamingLLM, arXiv 2309.17453, section 4.3) asks, every 10 lines of about 23 tokens,
for a fact from an earlier line. Its data was never released, so this module generates similar
data. A line and a query about it look like this:

    Line 12: The violin at number 87 belongs to a baker, Ruth Adams.

    Question: Who owns the violin at number 87 in line 12?
    Answer: Ruth

There are ten surnames. Each line's is drawn independently, and all ten are candidates for every
query, so a model that cannot see the line is right one time in ten. First names repeat every 101
lines.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_stream.errors import TextError, ValueRefused

QUERY_EVERY = 10
DISTANCES = (1, 5, 10, 20, 40, 80, 160)
HOW = (
    "A model reads the opening and the text of each line, in this order. A query is asked at its "
    "place in the list: the model reads its text, and the answer or a candidate follows directly, "
    "space included. The model is then rolled back to before the query, so that it reads no fact "
    "twice. 1 line back is the line before the query."
)
OPENING = "Below is a list of things and the people they belong to.\n"


def words(text: str) -> list[str]:
    return text.split()


# No surname is a prefix of another, and each is common enough to be one token in most vocabularies.
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
# There are 101, a prime number: whatever the stride, none repeats within 101 lines.
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
CANDIDATES = [f" {name}" for name in SURNAMES]


@dataclass(frozen=True)
class Line:
    """One fact, the question about it, and the answer to append, including its leading space."""

    number: int
    text: str
    question: str
    answer: str


@dataclass(frozen=True)
class Query:
    """A question about a line, asked after line `after` is read; questions are numbered from 1."""

    number: int
    after: int
    line: Line

    @property
    def lines_back(self) -> int:
        """How many lines back the query asks about; 1 is line `after` itself."""
        return self.after + 1 - self.line.number


@dataclass(frozen=True)
class StreamEvalData:
    """Lines 1, 2, 3, ... and the queries, in the order in which they are asked."""

    seed: int
    distances: list[int]
    lines: list[Line]
    queries: list[Query]

    @property
    def text(self) -> str:
        """The whole text, without the queries."""
        return OPENING + "".join(line.text for line in self.lines)

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the objects of the data file: a header, then the lines and queries in order."""
        yield {
            "format": "mlx_stream streameval",
            "version": 1,
            "seed": self.seed,
            "lines": len(self.lines),
            "distances": self.distances,
            "query_every": QUERY_EVERY,
            "how": HOW,
            "opening": OPENING,
        }
        queries = iter(self.queries)
        query = next(queries, None)
        for line in self.lines:
            yield {"line": line.number, "text": line.text}
            while query and query.after == line.number:
                yield {
                    "query": query.number,
                    "about": query.line.number,
                    "lines_back": query.lines_back,
                    "text": query.line.question,
                    "answer": query.line.answer,
                    "candidates": CANDIDATES,
                }
                query = next(queries, None)

    def as_bytes(self) -> bytes:
        """Return the data file: JSON Lines in ASCII, the same bytes on every machine."""
        return b"".join(json.dumps(one).encode("ascii") + b"\n" for one in self.records())


def make_data(seed: int, lines: int, distances: Sequence[int] = DISTANCES) -> StreamEvalData:
    """Generate lines and, after every tenth, one query per distance (in lines back, from 1).

    All distances are queried at the same points, beginning with the first that has a line far
    enough back. With the same seed, a shorter text is a prefix of a longer one.

    Worked example: with distances 5 and 20, the queries after line 20 are about lines 16 and 1, and
    those after line 30 are about lines 26 and 11. Raises ValueRefused if a number is out of range
    or there are too few lines.
    """
    if not 0 <= seed < 2**64:
        raise ValueRefused(f"--seed must be from 0 to 2^64 - 1, not {seed}")
    if min(distances, default=0) < 1:
        raise ValueRefused(f"--distances must be at least 1 line back, not {[*distances]}")
    # The first query comes after this line.
    first = -(-max(distances) // QUERY_EVERY) * QUERY_EVERY
    if lines < first:
        raise ValueRefused(
            f"--lines must be at least {first} for a query {max(distances)} lines back, "
            f"not {lines}: use more lines, or smaller --distances"
        )
    made = [make_line(seed, number) for number in range(1, lines + 1)]
    places = ((n, back) for n in range(first, lines + 1, QUERY_EVERY) for back in distances)
    # Line n is made[n - 1].
    queries = [Query(i, after, made[after - back]) for i, (after, back) in enumerate(places, 1)]
    return StreamEvalData(seed, [*distances], made, queries)


def make_line(seed: int, number: int) -> Line:
    """Return a line, which depends only on the seed and its number."""
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
    """Return an integer from 0 to count - 1: 64 bits of SHA-256 of "seed/number/what".

    `random` is not used: its results may change between Python versions.
    """
    digest = hashlib.sha256(f"{seed}/{number}/{what}".encode("ascii")).digest()
    return int.from_bytes(digest[:8], "big") % count


def write_data(data: StreamEvalData, path: Path) -> None:
    """Write the data file; raise TextError if it cannot be written."""
    try:
        path.write_bytes(data.as_bytes())
    except OSError as error:
        raise TextError(f"{path}: cannot be written: {error.strerror}") from error
