"""A server's totals, and their text format for Prometheus; independent of requests."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass
class Counters:
    """Totals since the server started.

    Attributes:
        refused: requests refused because the queue was full.
        read, cached, written: prompt tokens that were read, prompt tokens that were already
            attended, and reply tokens.
        evicted_turns: turns of requests' histories that were not attended, counted per request.
        first_seconds, firsts: total time from requests to their first pieces, and the number of
            first pieces.
        caches: replies by how the client's history was handled.
        statuses: responses by path and status.
    """

    refused: int = 0
    read: int = 0
    cached: int = 0
    written: int = 0
    evicted_turns: int = 0
    first_seconds: float = 0.0
    firsts: int = 0
    caches: Counter[str] = field(default_factory=Counter)
    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)


def metrics_text(counters: Counters, gauges: Mapping[str, float]) -> str:
    """Return the text that Prometheus reads."""
    lines = list[str]()

    def add(name: str, kind: str, values: Mapping[str, float]) -> None:
        lines.append(f"# TYPE mlx_stream_{name} {kind}")
        lines.extend(f"mlx_stream_{name}{labels} {value:g}" for labels, value in values.items())

    answers = {
        f'{{path="{path}",status="{status}"}}': count
        for (path, status), count in sorted(counters.statuses.items())
    }
    add("answers_total", "counter", answers)
    caches = {f'{{cache="{name}"}}': n for name, n in sorted(counters.caches.items())}
    add("replies_total", "counter", caches)
    totals = {
        "refused": counters.refused,
        "prompt_tokens_read": counters.read,
        "prompt_tokens_cached": counters.cached,
        "reply_tokens": counters.written,
        "evicted_turns": counters.evicted_turns,
    }
    for name, value in totals.items():
        add(f"{name}_total", "counter", {"": value})
    first = {"_sum": counters.first_seconds, "_count": counters.firsts}
    add("first_token_seconds", "summary", first)
    for name, value in gauges.items():
        add(name, "gauge", {"": value})
    return "\n".join([*lines, ""])
