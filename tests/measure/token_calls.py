"""Count what one plain token of a chat costs in Python: calls, generators resumed, classes used.

    python -m tests.measure.token_calls [--tokens 200]

A tiny model at a full window, greedy, without guesses, so that the figures are the same on every
machine. Classes are those whose methods run outside `models/` and `cache/`.
"""

import argparse
import inspect
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import mlx_stream
from tests.fakes.tiny import tiny_config, write_letters

PACKAGE = Path(mlx_stream.__file__).parent
INNER = ("models", "cache")


class Count:
    """The counts that the profiler collected."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.generators: set[str] = set()
        self.classes: set[str] = set()

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        if event != "call":
            return
        code, path = frame.f_code, Path(frame.f_code.co_filename)
        ours = PACKAGE in path.parents
        self.calls[code.co_qualname] += 1
        if ours and code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE):
            self.generators.add(code.co_qualname)
        if ours and path.relative_to(PACKAGE).parts[0] not in INNER and "self" in frame.f_locals:
            self.classes.add(type(frame.f_locals["self"]).__name__)


def measure(tokens: int) -> dict[str, Any]:
    """Return the counts per token, averaged over this many tokens."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_letters(Path(folder) / "letters", tiny_config())
        model = mlx_stream.load(path, dtype="float32", keep_quantized=False)
        chat = mlx_stream.ChatSession(
            model, window=64, sampling=mlx_stream.Sampling(temperature=0), speculate=False
        )
        pieces = chat.reply("Hello", max_tokens=1_000 + tokens)
        for _ in range(500):  # until the window is full and its step is traced
            next(pieces)
        count = Count()
        sys.setprofile(count)
        for _ in range(tokens):
            next(pieces)
        sys.setprofile(None)
        pieces.close()
    return {
        "python_calls": round(sum(count.calls.values()) / tokens, 2),
        "generators": sorted(count.generators),
        "classes": sorted(count.classes),
        "most": count.calls.most_common(12),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=200)
    print(json.dumps(measure(parser.parse_args().tokens), indent=1))


if __name__ == "__main__":
    main()
