"""The result of an experiment: facts about it and flat rows; independent of experiments."""

import csv
import io
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlx_stream import backend
from mlx_stream.errors import TextError
from mlx_stream.generate.model import Model

Row = dict[str, Any]
Progress = Callable[[int, int], None]  # called with the amount done and the total


def no_progress(done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class Report:
    """One experiment's result.

    Attributes:
        experiment: its name on the command line, as in `mlx_stream eval NAME`.
        about: what was measured, with which settings, and on which machine.
        rows: flat rows of figures; units are in the names (`_ms`, `_bytes`, `_per_second`).
        notes: caveats for readers, such as a peer that was not measured.
    """

    experiment: str
    about: Row
    rows: list[Row]
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> Row:
        return finite(asdict(self))

    def as_csv(self) -> str:
        """Return the rows as CSV; if a row lacks a figure, its cell is empty."""
        out = io.StringIO()
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        writer = csv.DictWriter(out, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return out.getvalue()


def facts(model: Model, **more: Any) -> Row:
    """Return the facts about a model and this machine that every report has, plus any given."""
    return {
        "model": Path(model.name).name,
        "dtype": str(model.dtype).removeprefix("mlx.core."),
        "quantized": model.quantized,
        "trained_context": model.config.max_position_embeddings,
        **more,
        "machine": backend.describe(),
    }


def finite(value: Any) -> Any:
    """Replace infinities and NaN, which JSON cannot express, with None."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_report(path: Path) -> Report:
    """Read a report that was printed with `--json`; raise TextError for any other file."""
    try:
        return Report(**json.loads(path.read_text("utf-8-sig")))
    except OSError as error:
        raise TextError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise TextError(f"{path}: not the output of `mlx_stream eval --json`") from error


def perplexity(nll: list[float]) -> float:
    """Return the exponential of the mean loss; losses are in nats."""
    try:
        return math.exp(math.fsum(nll) / len(nll))
    except OverflowError:
        return math.inf
