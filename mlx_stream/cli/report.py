"""Formats results and statistics, for people and for programs; computes none."""

import json
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_stream.generate.stats import Stats

LONGEST_QUOTE = 60
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
    print(f"[{stats}]", file=sys.stderr, flush=True)


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
    table = [columns, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(columns))]
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def shorten_line(text: str) -> str:
    """Return a text on one line, truncated if it is long."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_QUOTE else line[: LONGEST_QUOTE - 1] + "…"


def local_time(time: str) -> str:
    """Return a time in ISO 8601 as the clock of this machine shows it, to the minute."""
    return datetime.fromisoformat(time).astimezone().strftime("%Y-%m-%d %H:%M")
