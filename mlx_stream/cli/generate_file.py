"""Completes the prompts of a file, several at a time; an interrupted run can be resumed."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from mlx_stream.cli.terminal import progress_bar, read_text
from mlx_stream.engine.offline import run_all
from mlx_stream.errors import MlxStreamError, TextError, ValueRefused, one_line
from mlx_stream.evaluate.jsonl import open_log
from mlx_stream.evaluate.report import Row
from mlx_stream.generate.requests import Coroutine
from mlx_stream.models.window import MOST_STREAMS
from mlx_stream.program.atomic_replace import flush
from mlx_stream.text.pieces import Piece


def read_prompts(path: Path) -> dict[int, str]:
    """Return a JSON Lines file's prompts by line number: strings, or objects with a "prompt".

    Raises:
        ValueRefused: a line is neither, or the file contains no prompts.
    """
    prompts: dict[int, str] = {}
    for number, line in enumerate(read_text(str(path)).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            prompt = value["prompt"] if isinstance(value, dict) else value
        except (ValueError, KeyError, RecursionError):
            prompt = None
        if not isinstance(prompt, str) or not prompt:
            raise ValueRefused(
                f'{path}, line {number}: neither a JSON string nor an object with a "prompt"'
            )
        prompts[number] = prompt
    if not prompts:
        raise ValueRefused(f"{path}: contains no prompts")
    return prompts


def generate_file(
    path: Path,
    out: Path,
    streams: int,
    settings: Row,
    begin: Callable[[str], Coroutine[Piece, None]],
) -> None:
    """Write the reply to each prompt of `path` as a line of `out`, in the same order.

    Each finished reply is logged to a file with `.part` appended to the name of `out`, and running
    the same command again continues from there. If a prompt cannot be completed, its line in `out`
    holds an error instead.

    Args:
        streams: how many prompts are completed at a time.
        settings: what the replies depend on; a log with different settings is refused.
        begin: returns the coroutine that completes a prompt.

    Raises:
        ValueRefused: a value is out of range, a file cannot be used, or `out` already exists.
        TextError: a file cannot be read or written, or a prompt cannot be completed.
    """
    if not 1 <= streams <= MOST_STREAMS:
        raise ValueRefused(f"--streams must be from 1 to {MOST_STREAMS}, not {streams}")
    prompts, log_path = read_prompts(path), out.with_name(f"{out.name}.part")
    if os.path.lexists(out):
        finished = f"it is from a finished run, with {len(prompts):,} replies: "
        state = finished if lines_of(out) == [*prompts] else ""
        raise ValueRefused(f"{out}: already exists: {state}choose another --out")
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    with (
        open_log(log_path, {**settings, "prompts": digest}, {}) as log,
        progress_bar("completing") as progress,
    ):
        done = {row["line"] for row in log.rows}
        left = [line for line in prompts if line not in done]
        begins = (partial(begin, prompts[line]) for line in left)
        for place, found in run_all(begins, streams):
            log.append(row_of(left[place], found))
            progress(len(log.rows), len(prompts))
        write_replies(out, sorted(log.rows, key=lambda row: row["line"]))
    log_path.unlink()
    if failed := sum("error" in row for row in log.rows):
        raise TextError(f"{failed:,} of {len(prompts):,} prompts failed: see their lines in {out}")


def lines_of(out: Path) -> list[object]:
    """Return the line numbers of a file's replies; empty if it is not a file of replies."""
    try:
        return [json.loads(row)["line"] for row in out.read_text("utf-8").splitlines()]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def row_of(line: int, pieces: Sequence[Piece] | MlxStreamError) -> Row:
    if isinstance(pieces, MlxStreamError):
        return {"line": line, "error": one_line(pieces)}
    text = "".join(piece.text for piece in pieces)
    return {"line": line, "text": text, "finish": pieces[-1].finish}


def write_replies(out: Path, rows: Sequence[Row]) -> None:
    lines: Iterator[str] = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    new = out.with_name(f".{out.name}.{os.getpid()}.new")
    try:
        with new.open("x", encoding="utf-8") as file:
            file.writelines(lines)
        flush(new)
        new.replace(out)
    except OSError as error:
        raise TextError(f"{out}: cannot be written: {error.strerror}") from error
