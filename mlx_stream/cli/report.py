"""Formats results and statistics for people and for programs; computes nothing."""

import json
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from mlx_stream.program.terminal import styled_notice, terminal_size, wrap

if TYPE_CHECKING:
    from mlx_stream.generate.stats import Stats

LONGEST_QUOTE = 60
NARROWEST_TEXT = 24  # for the last column, whose words wrap; if narrower, it moves to its own lines
Columns = Sequence[tuple[str, str, str]]  # the key in the rows, the heading, the format


def print_json(result: dict[str, Any]) -> None:
    json.dump(result, sys.stdout)
    sys.stdout.write("\n")


def stats_as_json(stats: "Stats") -> dict[str, Any]:
    return {
        "prompt_tokens": stats.prompt_tokens,
        "reply_tokens": stats.reply_tokens,
        "prompt_tokens_per_second": stats.prompt_tokens_per_second,
        "tokens_per_second": stats.tokens_per_second,
        "drafted_tokens": stats.drafted_tokens,
        "accepted_tokens": stats.accepted_tokens,
        "attended": stats.attended,
        "evicted": stats.evicted,
        "sinks": stats.sinks,
        "window": stats.window,
        "cache_bytes": stats.cache_bytes,
        "seed": stats.seed,
        "notices": stats.notices,
    }


def print_stats(stats: "Stats") -> None:
    line = f"[{stats}]"
    if sys.stderr.isatty():
        line = styled_notice(line, terminal_size(sys.stderr)[0], dim=True)
    print(line, file=sys.stderr, flush=True)


def print_rows(rows: Sequence[dict[str, Any]], columns: Columns) -> None:
    """Print figures as a table."""
    shown = [[cell(row.get(key), form) for key, _, form in columns] for row in rows]
    print_table([heading for _, heading, _ in columns], shown)


def cell(value: Any, form: str) -> str:
    """Format one figure; `MB` shows bytes as megabytes."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return megabytes(value) if form == "MB" else format(value, form)


def megabytes(amount: float) -> str:
    return f"{amount / 1e6:,.1f}"


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns; plain text, so that it can be piped and pasted."""
    print_aligned([columns, *rows])


def print_aligned(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of equal length, each on one line, or on several to fit a terminal's width."""
    width = terminal_size(sys.stdout)[0] if sys.stdout.isatty() else sys.maxsize
    for row in aligned_lines(rows, width):
        print(row)


def print_text(text: str, indent: int = 0) -> None:
    """Print text; on a terminal its words wrap, and later lines are indented."""
    print(wrap(text, terminal_size(sys.stdout)[0], indent) if sys.stdout.isatty() else text)


def aligned_lines(rows: Sequence[Sequence[str]], width: int) -> Iterator[str]:
    """Yield each row as text with aligned columns, within a width in cells.

    The last column's words wrap. Columns that do not fit are shown below the others, indented: with
    a width of 9, columns of 5, 1 and 6 cells are on two lines, the last alone on the second.
    """
    from rich.cells import cell_len

    sizes = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    groups, used = [[0]], sizes[0] + 2
    for column, size in list(enumerate(sizes))[1:]:
        least = min(size, NARROWEST_TEXT) if column == len(sizes) - 1 else size
        if used + least > width:
            groups.append([])
            used = 2
        groups[-1].append(column)
        used += size + 2
    for row in rows:
        lines = []
        for group in groups:
            *padded, last = group
            cells = (row[i] + " " * (sizes[i] + 2 - cell_len(row[i])) for i in padded)
            begin = " " * (0 if group is groups[0] else 2) + "".join(cells)
            lines.append(wrap(begin + row[last], width, cell_len(begin)).rstrip())
        yield "\n".join(lines)


def shorten_line(text: str) -> str:
    """Return text on one line, truncated if it is long."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_QUOTE else line[: LONGEST_QUOTE - 1] + "…"


def local_time(time: str) -> str:
    """Convert an ISO 8601 time to this machine's local time, to the minute."""
    return datetime.fromisoformat(time).astimezone().strftime("%Y-%m-%d %H:%M")
