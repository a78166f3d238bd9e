"""The costs of a decode step other than time: bytes to read and graph nodes.

A step must read all weights and everything it attends to once. No machine can do that faster than
it can read memory.
"""

import io
import statistics
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_stream.evaluate.report import Row
from mlx_stream.models.layers import CausalLM
from mlx_stream.program.notices import Notify, discard

READ_BYTES = 256 * 2**20
READ_ROUNDS = 5
COLUMNS = 4096
NODE = "shape=rectangle"  # marks a primitive in the text of a graph


def weight_bytes_read(network: CausalLM) -> int:
    """Return how many bytes of weights a decode step reads.

    It reads all weights, but only one row of an embedding that does not also serve as the head.
    """
    arrays: list[tuple[str, mx.array]] = tree_flatten(network.parameters())  # type: ignore[assignment]
    total = 0
    for name, array in arrays:
        row_only = name.startswith("embed_tokens.") and not network.tied
        total += array.nbytes // (array.shape[0] if row_only else 1)
    return total


def read_rate(progress: Notify = discard) -> Row:
    """Measure how fast this machine reads memory: the fastest of a few reductions of one array.

    Returns `bytes_per_second` and the `operation` that reached it.
    """
    progress(f"reading {READ_BYTES // 2**20} MiB, {READ_ROUNDS} times in each of three ways")
    array = mx.ones((READ_BYTES // 4 // COLUMNS, COLUMNS))
    column = mx.ones((COLUMNS, 1))
    mx.eval(array, column)
    ways: dict[str, Callable[[], mx.array]] = {
        "sum": lambda: mx.sum(array),
        "max": lambda: mx.max(array),
        "product with a vector": lambda: array @ column,
    }
    rates = {name: array.nbytes / median_seconds(way) for name, way in ways.items()}
    mx.clear_cache()
    fastest = max(rates, key=rates.__getitem__)
    return {"bytes_per_second": rates[fastest], "operation": fastest}


def median_seconds(way: Callable[[], mx.array]) -> float:
    mx.eval(way())
    return statistics.median(time_step(lambda: mx.eval(way())) for _ in range(READ_ROUNDS))


def time_step(step: Callable[[], object]) -> float:
    """Return how many seconds a step takes."""
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun


def graph_nodes(*outputs: mx.array) -> int:
    """Return the number of primitives needed to compute arrays that are not evaluated yet.

    On the CPU backend this is only a proxy, because it expands operations that are one kernel on
    Metal.
    """
    text = io.StringIO()
    export: Any = mx.export_to_dot  # it accepts an open file as well as a name
    export(text, *outputs)
    return text.getvalue().count(NODE)
