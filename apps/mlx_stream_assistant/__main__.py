"""The assistant as a program: `python -m mlx_stream_assistant`, or this folder in a checkout."""

import sys
from pathlib import Path

# When run as a folder, the modules in it would shadow installed ones with the same names.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path.pop(0)

from mlx_stream_assistant.cli import main

if __name__ == "__main__":
    main()
