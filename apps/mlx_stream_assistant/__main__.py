"""`python -m mlx_stream_assistant`, or from a checkout `python apps/mlx_stream_assistant`."""

import sys
from pathlib import Path

# Started as a folder, its own modules would hide installed ones of the same names.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path.pop(0)

from mlx_stream_assistant.cli import main

if __name__ == "__main__":
    main()
