"""What a decode step costs beside its time: bytes to be read, nodes of its graph; knows no peer.

A step must read all weights and what it attends to once; no machine does that faster than it reads
memory.
"""

import io
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_stream.models.layers import CausalLM

READ_BYTES = 256 * 2**20
READ_ROUNDS = 5
COLUMNS = 4096
NODE = "shape=rectangle"  # of a primitive, in the text of a graph


@dataclass(frozen=True)
class ReadRate:
    """How fast memory is read here: bytes per second, and by which operation."""

    bytes_per_second: float
    operation: str


def weight_bytes_read(network: CausalLM) -> int:
    """Return the bytes of weights that a decode step reads: all of them, but of an embedding that
    is not the head as well only a row."""
    arrays: list[tuple[str, mx.array]] = tree_flatten(network.parameters())  # type: ignore[assignment]
    embedding = "embed_tokens."
    total = 0
    for name, array in arrays:
        row_only = name.startswith(embedding) and not network.tied
        total += array.nbytes // (array.shape[0] if row_only else 1)
    return total


def read_rate(progress: Callable[[str], None] = lambda line: None) -> ReadRate:
    """Measure how fast this machine reads memory: the fastest of a few reductions of one array."""
    progress(f"reading {READ_BYTES // 2**20} MiB, {READ_ROUNDS} times in each of three ways")
    array = mx.ones((READ_BYTES // 4 // COLUMNS, COLUMNS))
    column = mx.ones((COLUMNS, 1))
    mx.eval(array, column)
    ways: dict[str, Callable[[], mx.array]] = {
        "sum": lambda: mx.sum(array),
        "max": lambda: mx.max(array),
        "product with a vector": lambda: array @ column,
    }
    rates = [ReadRate(array.nbytes / median_seconds(way), name) for name, way in ways.items()]
    mx.clear_cache()
    return max(rates, key=lambda rate: rate.bytes_per_second)


def median_seconds(way: Callable[[], mx.array]) -> float:
    mx.eval(way())
    times = []
    for _ in range(READ_ROUNDS):
        begun = time.perf_counter()
        mx.eval(way())
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def graph_nodes(*outputs: mx.array) -> int:
    """Return how many primitives compute arrays that are not evaluated yet.

    On the CPU backend a proxy: it expands what is one kernel on Metal.
    """
    text = io.StringIO()
    export: Any = mx.export_to_dot  # takes an open file as well as a name
    export(text, *outputs)
    return text.getvalue().count(NODE)
