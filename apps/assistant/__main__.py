"""Run the assistant from a checkout: `python apps/assistant --help`."""

import sys
from pathlib import Path

# The package is beside this folder's name, and its modules have general names.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from assistant.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
