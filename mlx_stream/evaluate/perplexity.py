"""`eval perplexity`: one text read through several caches, segment by segment, one by one.

Memory is MLX's own count, of the weights a cache needs and of all that reading through it holds;
a peer brings weights of its own, and those of the others do not count.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from mlx_stream import backend
from mlx_stream.errors import ValueRefused
from mlx_stream.evaluate import llamacpp
from mlx_stream.evaluate.corpus import Corpus, segments_of
from mlx_stream.evaluate.mlx_lm import load_peer
from mlx_stream.evaluate.readers import (
    FreshReader,
    PeerReader,
    Reader,
    RecomputeReader,
    StreamReader,
)
from mlx_stream.evaluate.report import Row, perplexity
from mlx_stream.load import Model
from mlx_stream.window import PREFILL_CHUNK

# What may be set for each cache, and for all of them: how far it reads.
SETTINGS: dict[str, tuple[str, ...]] = {
    "stream": ("chunk", "kv", "clock"),
    "fresh": ("chunk",),
    "window": ("chunk",),
    "dense": ("chunk",),
    "recompute": ("stride", "sinks"),
    "mlx-lm": ("chunk",),
    "llama.cpp": ("chunk",),
}
MLX_COUNTS = ("active_bytes", "peak_bytes")
DEFAULTS = {"chunk": PREFILL_CHUNK, "stride": 128, "sinks": 0}


@dataclass(frozen=True)
class Spec:
    """One cache to read a text through: a name, and settings that are not the defaults."""

    name: str
    settings: dict[str, int] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What the cache is called in tables: `recompute, stride 8`."""
        shown = {"stride": self["stride"]} if self.name == "recompute" else {}
        shown |= {k: v for k, v in self.settings.items() if k != "tokens"}
        return ", ".join([self.name, *(f"{key} {value}" for key, value in shown.items())])

    def __getitem__(self, setting: str) -> int:
        return self.settings.get(setting, DEFAULTS[setting])

    def limit(self, tokens: int) -> int:
        return min(self.settings.get("tokens", tokens), tokens)


def parse_setting(text: str) -> Spec:
    """Read `NAME[,SETTING=NUMBER...]`, such as `recompute,stride=8,tokens=4096`.

    Raises:
        ValueRefused: no such cache or setting, or a number that is none.
    """
    name, *pairs = text.split(",")
    if name not in SETTINGS:
        raise ValueRefused(f"--cache must be one of {', '.join(SETTINGS)}, not {name!r}")
    allowed = ("tokens", *SETTINGS[name])
    settings = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key not in allowed:
            raise ValueRefused(f"--cache {name} takes {', '.join(allowed)}, not {key!r}")
        if not (value.isascii() and value.isdigit() and len(value) < 10):
            least = 0 if key == "sinks" else 1
            raise ValueRefused(
                f"--cache {text}: {key} must be a whole number, at least {least}, not {value!r}"
            )
        if key in settings:
            raise ValueRefused(f"--cache {text}: {key} is given twice")
        settings[key] = int(value)
        if settings[key] < 1 and key != "sinks":
            raise ValueRefused(f"--cache {text}: {key} must be at least 1")
    if settings.get("kv", 8) not in (8, 4):
        raise ValueRefused(f"--cache {text}: kv must be 8 or 4")
    return Spec(name, settings)


@dataclass(frozen=True)
class Setting:
    """What all caches of one run share."""

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


def check_settings(setting: Setting, specs: Sequence[Spec]) -> None:
    """Refuse, before anything is read, what cannot be measured.

    Raises:
        ValueRefused: a number out of range, or the same cache twice.
        TextError: a cache would read less than a segment.
    """
    if setting.segment < 1:
        raise ValueRefused(f"--segment must be at least 1, not {setting.segment}")
    if setting.tokens < 1:
        raise ValueRefused(f"--tokens must be at least 1, not {setting.tokens}")
    labels = [spec.label for spec in specs]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice:
        raise ValueRefused(f"--cache {twice} is given twice")
    for spec in specs:
        segments_of(setting.text, spec.limit(setting.tokens), setting.segment)
        if spec.name == "recompute" and spec["stride"] > setting.capacity - spec["sinks"]:
            raise ValueRefused(
                f"--cache recompute: a stride of {spec['stride']} and {spec['sinks']} sinks exceed "
                f"the cache of {setting.capacity} tokens: use a smaller stride or a larger window"
            )
        if "clock" in spec.settings:
            lowest = setting.model.new_cache(setting.sinks, setting.window).lowest_clock_limit
            if spec.settings["clock"] < lowest:
                raise ValueRefused(
                    f"--cache {spec.label}: the clock of this window is lowered at {lowest:,} at "
                    "the earliest"
                )


def measure_perplexity(
    setting: Setting,
    specs: Sequence[Spec],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Row]:
    """Read the text through one cache after another; yield a row per cache and segment.

    Args:
        progress: called with tokens read and to read, of all caches together.
    """
    check_settings(setting, specs)
    counts = [
        segments_of(setting.text, spec.limit(setting.tokens), setting.segment) for spec in specs
    ]
    total, done = sum(counts) * setting.segment, 0
    progress(done, total)
    for spec, count in zip(specs, counts, strict=True):
        gc.collect()
        mx.clear_cache()
        ours = spec.name not in ("mlx-lm", "llama.cpp")
        others = mx.get_active_memory() - (setting.model.weight_bytes if ours else 0)
        ids = setting.text.first(count * setting.segment + 1)
        reader = open_reader(setting, spec, ids)
        for row in read_segments(setting, reader, count):
            for name in MLX_COUNTS:
                # llama.cpp's memory is none of MLX's.
                row[name] = None if spec.name == "llama.cpp" else row[name] - others
            yield {"cache": spec.label, **row}
            done += setting.segment
            progress(done, total)
        del reader


def read_segments(setting: Setting, reader: Reader, count: int) -> Iterator[Row]:
    mx.reset_peak_memory()
    for segment in range(count):
        start = segment * setting.segment
        stop = start + setting.segment
        begun = time.perf_counter()
        nll = reader.read(start, stop)
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
    model, sinks, window = setting.model, setting.sinks, setting.window
    match spec.name:
        case "stream":
            cache = model.new_cache(sinks, window, kv_bits=spec.settings.get("kv"))
            # Lower than it chooses itself: then it is lowered, and rows are turned, more often.
            cache.clock_limit = spec.settings.get("clock", cache.clock_limit)
            return StreamReader(model, ids, cache, spec["chunk"])
        case "window":
            cache = model.new_cache(0, setting.capacity)
            return StreamReader(model, ids, cache, spec["chunk"])
        case "dense":
            return StreamReader(model, ids, model.new_dense_cache(), spec["chunk"])
        case "fresh":
            return FreshReader(model, ids, sinks, window, spec["chunk"])
        case "recompute":
            return RecomputeReader(model, ids, setting.capacity, spec["stride"], spec["sinks"])
        case "mlx-lm":
            peer = load_peer(setting.folder, model)
            return PeerReader(peer, ids, setting.capacity, sinks, spec["chunk"])
        case _:
            assert setting.gguf is not None
            return llamacpp.LlamaCppReader(
                setting.gguf, ids, setting.capacity, sinks, spec["chunk"]
            )
