"""Results of every experiment, as they might be measured, to draw charts of."""

from typing import Any

from mlx_stream.evaluate.report import Report, Row

MACHINE = {"device": "AMD EPYC", "cores": 2, "metal": False, "mlx_stream": "0.1.0", "mlx": "0.32.4"}
MODEL: Row = {"model": "tiny", "dtype": "float32", "texts": ["a.txt", "emma.txt"]}
ABOUT = MODEL | {
    "trained_context": 8_192,
    "sinks": 4,
    "window": 1_020,
    "segment": 2_048,
    "machine": MACHINE,
}
FLAT = [17.9, 20.2, 22.5, 22.7, 23.6, 21.6, 22.2, 20.2] * 3
DENSE = [17.6, 19.5, 21.8, 20.7, 23.1, 36.7, 192.0, 600.0]


def table(keys: str, *rows: tuple[Any, ...]) -> list[Row]:
    return [dict(zip(keys.split(), row, strict=True)) for row in rows]


def segments(cache: str, losses: list[float], speed: float, active: float | None) -> list[Row]:
    """Return the rows of one cache; `dense` slows down and grows."""
    tokens = range(2_048, 2_048 * len(losses) + 1, 2_048)
    own = [(t, x, 1 + (cache == "dense") * t / 3_600) for t, x in zip(tokens, losses, strict=True)]
    rows = [(cache, t, x, speed / grown, active and active * grown) for t, x, grown in own]
    return table("cache tokens perplexity tokens_per_second active_bytes", *rows)


def sweep(losses: list[float]) -> list[Row]:
    rows = table("sinks window perplexity", *zip((0, 1, 2, 4, 8), WINDOWS, losses, strict=True))
    return [row | {"cache_bytes": 46_080 * row["window"]} for row in rows]


WINDOWS = [252, 508, 1_020, 2_044, 4_092]
CACHES = [
    *segments("dense", DENSE, 172, 240e6),
    *segments("window", [40, 900, *[2_300.0] * 22], 109, 586e6),
    *segments("recompute, stride 128", FLAT[:8], 11, 586e6),
    *segments("fresh", FLAT, 75, 586e6),
    *segments("stream", FLAT, 110, 586e6),
    *segments("mlx-lm", [23, 32, *[37.0] * 22], 108, 587e6),
    *segments("mlx-lm, chunk 1", FLAT[:4], 25, 588e6),
    *segments("llama.cpp", [1.08 * loss for loss in FLAT], 130, None),
]
TIMES = {"stream": (28, 32, 44), "recompute": (300, 1_100, 5_100), "mlx-lm": (29, 34, 47)}
LATENCY = table(
    "cache method p50_ms p99_ms",
    *((256 * 4**i, name, at, 1.3 * at) for name in TIMES for i, at in enumerate(TIMES[name])),
    (1_024, "stream, re-anchoring", 60.5, 62.0),
    (1_024, "stream, plain", 33.5, 35.0),
)
STREAMEVAL = table(
    "lines_back tokens_back queries likelihood generation inside",
    (1, 23.4, 50, 1.0, 0.98, True),
    (10, 234.0, 50, 0.95, 0.88, True),
    (40, 936.0, 50, 0.9, 0.71, True),
    (60, 1_404.0, 50, 0.12, 0.02, False),
    (160, 3_744.0, 50, 0.09, 0.0, False),
)
FRESH = {"from": 100_000, "to": 200_000, "perplexity": 21.25, "stream_perplexity": 21.35}
LONG = [row for row in segments("stream", FLAT * 5, 110, 586e6) if row.pop("cache")]
REPORTS = {
    "perplexity": Report("perplexity", ABOUT, CACHES),
    "endurance": Report("endurance", ABOUT | {"fresh": FRESH}, LONG),
    "sinks": Report("sinks", MODEL, sweep([412, 24.1, 21.9, 21.1, 21.05])),
    "windows": Report("windows", MODEL, sweep([38, 31.2, 26.8, 24.1, 22.3])),
    "latency": Report("latency", MODEL | {"machine": MACHINE}, LATENCY),
    "streameval": Report("streameval", ABOUT | {"candidates": 10}, STREAMEVAL),
}
NEEDED = {
    "perplexity": "cache tokens perplexity tokens_per_second active_bytes",
    "endurance": "tokens perplexity tokens_per_second active_bytes",
    "sinks": "sinks window perplexity",
    "windows": "window perplexity cache_bytes",
    "latency": "cache method p50_ms p99_ms",
    "streameval": "lines_back tokens_back likelihood generation inside",
}
