"""Tensors -> safetensors shards and their index, one shard in memory at a time; knows no model."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_stream.checkpoint.folder import INDEX, check_shard

SHARD_BYTES = 10**9


@dataclass
class Shards:
    """What was written: how many files, bytes of all tensors and of the largest shard's."""

    count: int = 0
    tensor_bytes: int = 0
    largest: int = 0


def write_shards(
    tensors: Iterable[tuple[str, mx.array]], folder: Path, limit: int = SHARD_BYTES
) -> Shards:
    """Write tensors in the order they come, `model.safetensors` or numbered shards, and an index.

    A shard has at most `limit` bytes of tensors, or one tensor; it is let go of before the next
    tensor is asked for.
    """
    written, placed = Shards(), {}
    shard: dict[str, mx.array] = {}
    held = 0
    for name, array in tensors:
        if shard and held + array.nbytes > limit:
            placed |= dict.fromkeys(shard, written.count)
            write_shard(shard, folder, written)
            held = 0
        shard[name] = array
        held += array.nbytes
        del array
    placed |= dict.fromkeys(shard, written.count)
    write_shard(shard, folder, written)
    names = name_shards(folder, written.count)
    index = {
        "metadata": {"total_size": written.tensor_bytes},
        "weight_map": {name: names[place] for name, place in sorted(placed.items())},
    }
    write_json(index, folder / INDEX)
    return written


def write_shard(shard: dict[str, mx.array], folder: Path, written: Shards) -> None:
    """Write one shard under a name for now, and empty it."""
    size = sum(array.nbytes for array in shard.values())
    path = temporary(folder, written.count)
    mx.save_safetensors(str(path), shard, metadata={"format": "mlx"})
    shard.clear()
    mx.clear_cache()
    check_shard(path)
    written.count += 1
    written.tensor_bytes += size
    written.largest = max(written.largest, size)


def name_shards(folder: Path, count: int) -> list[str]:
    """Give the shards the names that say how many there are."""
    names = ["model.safetensors"]
    if count > 1:
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for place, name in enumerate(names):
        temporary(folder, place).replace(folder / name)
    return names


def temporary(folder: Path, place: int) -> Path:
    return folder / f"shard-{place}.safetensors"


def write_json(value: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
