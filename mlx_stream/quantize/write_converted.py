"""Writes a converted checkpoint to a folder, using bounded memory; runs no model."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_stream import backend
from mlx_stream.checkpoint import Checkpoint
from mlx_stream.checkpoint.shards import Shards
from mlx_stream.checkpoint.write import refuse_taken, write_folder
from mlx_stream.config import ModelConfig
from mlx_stream.errors import CheckpointError, ValueRefused
from mlx_stream.quantize.conversion import Conversion, name_of, prepare_conversion
from mlx_stream.quantize.recipes import Recipe

VERSION = 1  # the version of conversion.json
# Matrices held in addition to the shard being filled: one matrix, its converted blocks, and the
# joined result.
MATRICES_HELD = 3


@dataclass
class ConversionResult:
    """A finished conversion and its memory use.

    Attributes:
        about: the content of `conversion.json`.
        unquantized: paths of matrices kept as floats because their rows do not divide into groups.
        bound_bytes: the bound on MLX's memory: three times the largest matrix plus the largest
            shard.
        peak_bytes: MLX's peak memory.
        resident_bytes: this process's maximum growth, measured after each tensor.
    """

    about: dict[str, Any] = field(default_factory=dict)
    unquantized: list[str] = field(default_factory=list)
    files: int = 0
    bound_bytes: int = 0
    peak_bytes: int = 0
    resident_bytes: int = 0


def write_converted(
    checkpoint: Checkpoint,
    out: Path,
    recipe: Recipe | None = None,
    dtype: str | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ConversionResult:
    """Write a checkpoint to the folder `out`, quantized by a recipe, with its floats in a dtype.

    Matrices are read, quantized and released one at a time, so a model may be larger than memory;
    tensors are removed from the checkpoint along the way. The folder appears complete or not at
    all, and the same source and options produce the same bytes.

    Args:
        recipe, dtype: see `prepare_conversion`.
        force: replace the folder of an earlier conversion.
        progress: called with the number of parts written and the total.

    Raises:
        ValueRefused: `out` is taken, or the recipe does not fit.
        CheckpointError: the source is damaged, or the result could not be written.
    """
    refuse_taken(out, force)
    conversion = prepare_conversion(checkpoint, recipe, dtype)
    watch, result = MemoryMonitor(conversion, progress), ConversionResult()

    def about(shards: Shards) -> dict[str, Any]:
        result.about = describe_conversion(conversion, watch.sizes, shards, recipe)
        return result.about

    written = write_folder(conversion.checkpoint, out, watch.tensors(), about, force)
    if written is None:
        raise CheckpointError(f"{out}: another process has written this folder; it was left alone")
    if recipe is not None:
        result.unquantized = [path for path, kind in conversion.quantized.items() if kind is None]
    result.files = written.count
    result.bound_bytes = MATRICES_HELD * conversion.largest + written.largest
    result.peak_bytes = mx.get_peak_memory() - watch.active
    result.resident_bytes = watch.resident
    return result


class MemoryMonitor:
    """Records the size of each tensor that a conversion writes, and the memory use."""

    def __init__(self, conversion: Conversion, progress: Callable[[int, int], None]):
        self.conversion, self.progress = conversion, progress
        self.sizes: dict[str, int] = {}
        mx.clear_cache()
        mx.reset_peak_memory()
        self.active, self.before = mx.get_active_memory(), backend.resident_bytes()
        self.resident = 0

    def tensors(self) -> Iterator[tuple[str, mx.array]]:
        done, total = 0, sum(1 for _ in self.conversion.layout.parts)
        for name, array in self.conversion.tensors():
            self.sizes[name] = array.nbytes
            self.resident = max(self.resident, backend.resident_bytes() - self.before)
            yield name, array
            del array
            mx.clear_cache()
            done += name.endswith(".weight")
            self.progress(done, total)


def describe_conversion(
    conversion: Conversion, sizes: Mapping[str, int], shards: Shards, recipe: Recipe | None
) -> dict[str, Any]:
    """Return the content of `conversion.json`, without dates, machines or paths."""
    parameters = conversion.layout.parameters
    return {
        "conversion": VERSION,
        "recipe": recipe.name if recipe else None,
        "dtype": name_of(conversion.dtype) if conversion.dtype else None,
        "source_quantized": conversion.config.quantization is not None,
        "parameters": parameters,
        "tensor_bytes": shards.tensor_bytes,
        "bits_per_weight": round(8 * shards.tensor_bytes / parameters, 4),
        "bytes_per_token": bytes_per_token(conversion.config, sizes),
        "report": None,
    }


def bytes_per_token(config: ModelConfig, sizes: Mapping[str, int]) -> int:
    """Return how many bytes of weights are read to decode one token.

    An embedding that is not also the head counts as one row; everything else counts in full.
    """
    total = sum(sizes.values())
    if config.tie_word_embeddings:
        return total
    table = sum(size for name, size in sizes.items() if name.startswith("model.embed_tokens."))
    return total - table + table // config.vocab_size


def refuse_places(source: Path, out: Path) -> None:
    """Raise ValueRefused if the result would replace the source, lie inside it or contain it."""
    inner, outer = source.resolve(), out.resolve()
    if inner == outer or inner in outer.parents or outer in inner.parents:
        raise ValueRefused(
            f"{out}: is the source, is inside it, or contains it: use another folder"
        )
