"""The assistant as a program: `python -m mlx_stream_assistant`, or this folder in a checkout."""

import sys
from pathlib import Path

# When this folder itself is run, its modules would shadow installed ones of the same name.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path.pop(0)

from mlx_stream_assistant.cli import main

if __name__ == "__main__":
    main()
