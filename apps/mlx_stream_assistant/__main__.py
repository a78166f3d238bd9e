"""The assistant as a program: `python -m mlx_stream_assistant`, or this folder of a checkout."""

import sys
from pathlib import Path

# Run as a folder, its modules would hide installed ones of the same names.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path.pop(0)

from mlx_stream_assistant.cli import main

if __name__ == "__main__":
    main()
