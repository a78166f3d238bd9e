"""`eval perplexity`: one text read through several caches, one after another, segment by segment.

Memory is MLX's own count of the weights that a cache needs and of everything held while reading
through it. A peer has its own weights; the weights of the other caches are not counted.
"""

import gc
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from mlx_stream import backend
from mlx_stream.errors import TextError, ValueRefused
from mlx_stream.evaluate import llamacpp
from mlx_stream.evaluate.corpus import Corpus
from mlx_stream.evaluate.mlx_lm import load_peer
from mlx_stream.evaluate.readers import (
    Reader,
    fresh_reader,
    peer_reader,
    recompute_reader,
    stream_reader,
)
from mlx_stream.evaluate.report import Progress, Row, no_progress, perplexity
from mlx_stream.generate.model import Model
from mlx_stream.models.window import PREFILL_CHUNK

# The settings of each cache, apart from `tokens`, which is how far it reads.
SETTINGS: dict[str, tuple[str, ...]] = {
    "stream": ("chunk", "kv", "clock"),
    "fresh": ("chunk",),
    "window": ("chunk",),
    "dense": ("chunk",),
    "recompute": ("stride", "sinks"),
    "mlx-lm": ("chunk",),
    "llama.cpp": ("chunk",),
}
PEERS = ("mlx-lm", "llama.cpp")
DEFAULTS = {"chunk": PREFILL_CHUNK, "stride": 128, "sinks": 0}


@dataclass(frozen=True)
class Spec:
    """One cache to read a text through: a name, and the settings that differ from the defaults."""

    name: str
    settings: dict[str, int] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The name of the cache in tables: `recompute, stride 8`."""
        shown = {"stride": self["stride"]} if self.name == "recompute" else {}
        shown |= {k: v for k, v in self.settings.items() if k != "tokens"}
        return ", ".join([self.name, *(f"{key} {value}" for key, value in shown.items())])

    def __getitem__(self, setting: str) -> int:
        return self.settings.get(setting, DEFAULTS[setting])


@dataclass(frozen=True)
class Setting:
    """The model, the text and the sizes that all caches of one run share."""

    model: Model
    folder: Path
    text: Corpus
    sinks: int
    window: int
    tokens: int
    segment: int
    gguf: Path | None = None

    @property
    def capacity(self) -> int:
        return self.sinks + self.window

    def segments(self, spec: Spec) -> int:
        """Return how many whole segments a cache reads, each with a next token to predict."""
        tokens = min(spec.settings.get("tokens", self.tokens), self.tokens)
        return min(tokens, len(self.text.ids) - 1) // self.segment


def check_settings(setting: Setting, specs: Sequence[Spec]) -> None:
    """Raise ValueRefused or TextError for caches that cannot be measured."""
    for option, number in (("--segment", setting.segment), ("--tokens", setting.tokens)):
        if number < 1:
            raise ValueRefused(f"{option} must be at least 1, not {number}")
    setting.text.require(setting.segment, "--segment")
    for spec in specs:
        if not setting.segments(spec):
            raise TextError(
                f"--cache {spec.label} reads less than a segment of {setting.segment:,} tokens: "
                "use a larger --tokens (or tokens= for the cache), or a smaller --segment"
            )
        if spec.name == "recompute" and spec["stride"] > setting.capacity - spec["sinks"]:
            raise ValueRefused(
                f"--cache recompute: a stride of {spec['stride']} and {spec['sinks']} sinks exceed "
                f"the cache of {setting.capacity} tokens: use a smaller stride or a larger window"
            )
        if "clock" in spec.settings:
            lowest = setting.model.new_cache(setting.sinks, setting.window).lowest_clock_limit
            if spec.settings["clock"] < lowest:
                raise ValueRefused(f"--cache {spec.label}: clock must be at least {lowest:,}")


def measure_perplexity(
    setting: Setting, specs: Sequence[Spec], progress: Progress = no_progress
) -> Iterator[Row]:
    """Read the text through one cache after another; yield a row per cache and segment.

    `progress` is called with the number of tokens read through all caches together.
    """
    total, done = sum(map(setting.segments, specs)) * setting.segment, 0
    progress(done, total)
    for spec in specs:
        gc.collect()
        mx.clear_cache()
        weights = 0 if spec.name in PEERS else setting.model.weight_bytes
        others = mx.get_active_memory() - weights
        ids = setting.text.first(setting.segments(spec) * setting.segment + 1)
        reader = open_reader(setting, spec, ids)
        for row in read_segments(setting, reader, setting.segments(spec)):
            for name in ("active_bytes", "peak_bytes"):  # MLX does not see llama.cpp's memory
                row[name] = None if spec.name == "llama.cpp" else row[name] - others
            yield {"cache": spec.label, **row}
            done += setting.segment
            progress(done, total)
        del reader


def read_segments(setting: Setting, read: Reader, count: int) -> Iterator[Row]:
    mx.reset_peak_memory()
    for segment in range(count):
        start = segment * setting.segment
        stop = start + setting.segment
        begun = time.perf_counter()
        nll = read(start, stop)
        seconds = time.perf_counter() - begun
        yield {
            "segment": segment,
            "tokens": stop,
            "perplexity": perplexity(nll),
            "nll": math.fsum(nll) / len(nll),
            "tokens_per_second": setting.segment / seconds,
            "active_bytes": mx.get_active_memory(),
            "peak_bytes": mx.get_peak_memory(),
            "resident_bytes": backend.resident_bytes(),
        }


def open_reader(setting: Setting, spec: Spec, ids: Sequence[int]) -> Reader:
    model, sinks, window, capacity = setting.model, setting.sinks, setting.window, setting.capacity
    match spec.name:
        case "stream":
            cache = model.new_cache(sinks, window, kv_bits=spec.settings.get("kv"))
            # With a lower limit, the cache re-anchors more often.
            cache.clock_limit = spec.settings.get("clock", cache.clock_limit)
            return stream_reader(model, ids, cache, spec["chunk"])
        case "window":
            return stream_reader(model, ids, model.new_cache(0, capacity), spec["chunk"])
        case "dense":
            return stream_reader(model, ids, model.new_dense_cache(), spec["chunk"])
        case "fresh":
            return fresh_reader(model, ids, sinks, window, spec["chunk"])
        case "recompute":
            return recompute_reader(model, ids, capacity, spec["stride"], spec["sinks"])
        case "mlx-lm":
            peer = load_peer(setting.folder, model)
            return peer_reader(peer, ids, capacity, sinks, spec["chunk"])
        case _:
            assert setting.gguf is not None
            return llamacpp.LlamaCpp(setting.gguf, ids, capacity, sinks, spec["chunk"]).read
