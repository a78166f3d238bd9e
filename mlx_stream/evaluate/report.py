"""The result of an experiment: facts about it and flat rows; knows no experiment, no terminal."""

import csv
import io
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlx_stream import backend
from mlx_stream.errors import TextError, ValueRefused
from mlx_stream.load import Model

Row = dict[str, Any]


@dataclass(frozen=True)
class Report:
    """One experiment's result.

    Attributes:
        experiment: its name on the command line, as in `mlx_stream eval NAME`.
        about: what was measured, with which settings, on which machine.
        rows: figures, flat; units are in the names (`_ms`, `_bytes`, `_per_second`).
        notes: what a reader must know, such as a peer that was not measured.
    """

    experiment: str
    about: Row
    rows: list[Row]
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> Row:
        return finite(asdict(self))

    def as_csv(self) -> str:
        """Return the rows as CSV; a row without a figure leaves its cell empty."""
        out = io.StringIO()
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        writer = csv.DictWriter(out, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return out.getvalue()


def facts(model: Model, **more: Any) -> Row:
    """Return what every report says of its model and this machine, and what is given."""
    return {
        "model": Path(model.name).name,
        "dtype": str(model.dtype).removeprefix("mlx.core."),
        "quantized": model.quantized,
        "trained_context": model.config.max_position_embeddings,
        **more,
        "machine": backend.describe(),
    }


def finite(value: Any) -> Any:
    """Replace what JSON has no number for, infinities and NaN, by None."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_report(path: Path) -> Report:
    """Read a report that was printed with `--json`.

    Raises:
        TextError: the file cannot be read, or is not a report.
    """
    try:
        raw = json.loads(path.read_text("utf-8-sig"))
        return Report(raw["experiment"], raw["about"], raw["rows"], raw["notes"])
    except OSError as error:
        raise TextError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise TextError(f"{path}: not a result that `mlx_stream eval --json` printed") from error


def refuse_twice(option: str, values: list[Any]) -> None:
    """Raise ValueRefused if an option that may be given several times has one value twice."""
    for value in values:
        if values.count(value) > 1:
            raise ValueRefused(f"{option} {value} is given twice")


def perplexity(nll: list[float]) -> float:
    """Return exp of the mean of losses in nats."""
    try:
        return math.exp(math.fsum(nll) / len(nll))
    except OverflowError:
        return math.inf
