"""Completes the prompts of a file, several at a time; a run that was cut continues."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mlx_stream.cli.terminal import progress_bar, read_text
from mlx_stream.engine.offline import run_all
from mlx_stream.errors import TextError, ValueRefused
from mlx_stream.evaluate.jsonl import open_log
from mlx_stream.evaluate.report import Row
from mlx_stream.generate.requests import Coroutine
from mlx_stream.program.atomic_replace import flush
from mlx_stream.text.pieces import Piece

MOST_STREAMS = 64


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a JSON Lines file: strings, or objects with a "prompt".

    Raises:
        ValueRefused: a line is neither, or there is none.
    """
    prompts: list[str] = []
    for number, line in enumerate(read_text(str(path)).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            prompt = value["prompt"] if isinstance(value, dict) else value
        except (ValueError, KeyError):
            prompt = None
        if not isinstance(prompt, str) or not prompt:
            raise ValueRefused(
                f'{path}, line {number}: not a JSON string, nor an object with a "prompt"'
            )
        prompts.append(prompt)
    if not prompts:
        raise ValueRefused(f"{path}: there are no prompts in it")
    return prompts


def generate_file(
    path: Path,
    out: Path,
    streams: int,
    settings: Row,
    begin: Callable[[str], Coroutine[Piece, None]],
) -> None:
    """Write the reply to each prompt of `path` as a line of `out`, in the same order.

    Replies are logged in `out` with `.part` behind its name as they end, and the same command
    continues from there.

    Args:
        streams: how many prompts are completed at a time.
        settings: what the replies depend on; a log of other settings is refused.
        begin: returns the coroutine that completes a prompt.

    Raises:
        ValueRefused: a value or file that will not do, or `out` exists.
        TextError: a file cannot be read or written.
    """
    if not 1 <= streams <= MOST_STREAMS:
        raise ValueRefused(f"--streams must be from 1 to {MOST_STREAMS}, not {streams}")
    if out.exists():
        raise ValueRefused(f"{out}: exists: choose another --out")
    prompts, log_path = read_prompts(path), out.with_name(f"{out.name}.part")
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    with (
        open_log(log_path, {**settings, "prompts": digest}, {}) as log,
        progress_bar("completing") as progress,
    ):
        done = {row["line"] for row in log.rows}
        left = [at for at in range(len(prompts)) if at + 1 not in done]
        for place, pieces in run_all((begin(prompts[at]) for at in left), streams):
            log.append(row_of(left[place] + 1, pieces))
            progress(len(log.rows), len(prompts))
        write_replies(out, sorted(log.rows, key=lambda row: row["line"]))
    log_path.unlink()


def row_of(line: int, pieces: Sequence[Piece]) -> Row:
    text = "".join(piece.text for piece in pieces)
    return {"line": line, "text": text, "finish": pieces[-1].finish}


def write_replies(out: Path, rows: Sequence[Row]) -> None:
    lines: Iterator[str] = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    new = out.with_name(f"{out.name}.new")
    try:
        new.write_text("".join(lines), "utf-8")
        flush(new)
        new.replace(out)
    except OSError as error:
        raise TextError(f"{out}: cannot be written: {error.strerror}") from error
