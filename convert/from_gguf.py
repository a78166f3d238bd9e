"""A llama.cpp file as a folder, without loss: Q4_0, Q4_1 and Q8_0 blocks repacked, not rounded.

python convert/from_gguf.py MODEL.gguf OUT
"""

from mlx_stream.cli.convert import Force, Out, Report, Source, convert, run_script
from mlx_stream.cli.terminal import fail


def from_gguf(source: Source, out: Out, report: Report = None, force: Force = False) -> None:
    """Write the .gguf file SOURCE as a folder of the same weights."""
    if not source.lower().endswith(".gguf"):
        fail(f"{source}: not a .gguf file: use `mlx_stream convert`")
    convert(source, out, report=report, force=force)


if __name__ == "__main__":
    run_script(from_gguf)
