"""Makes MLX fail while it computes a step: a weight is read from a truncated file.

As with a device that fails, MLX reports this once. The weight then counts as evaluated and holds
what was in the file: wrong numbers.

    python -m tests.fakes.failing FILE ...

runs the assistant with the remaining arguments. Whenever FILE exists, it removes FILE and makes one
step of reading fail.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx_stream  # noqa: F401  # isort: skip  # first: it loads OpenBLAS ahead of MLX

import mlx.core as mx

WRONG = 7.0


@contextmanager
def failing(network: Any) -> Iterator[None]:
    """Make the next untraced step fail; call this on the thread that computes."""
    layer = network.layers[0].input_layernorm
    good = layer.weight
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cut.safetensors"
        mx.save_safetensors(str(path), {"weight": mx.full(good.shape, WRONG, good.dtype)})
        layer.weight = mx.load(str(path))["weight"]  # type: ignore[index]
        os.truncate(path, path.stat().st_size - 1)
        try:
            yield
        finally:
            layer.weight = good


def main(trigger: Path, *words: str) -> None:
    from mlx_stream.generate.requests import ReadRequest, ReadResult, Want
    from mlx_stream.generate.token_stream import TokenStream
    from mlx_stream_assistant import cli

    run = TokenStream.run

    def run_or_fail(self: TokenStream, request: ReadRequest) -> ReadResult:
        if request.want is not Want.NOTHING or not trigger.exists():
            return run(self, request)
        trigger.unlink()
        with failing(self.network):
            return run(self, request)

    TokenStream.run = run_or_fail  # type: ignore[method-assign]
    sys.argv[1:] = words
    cli.main()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
