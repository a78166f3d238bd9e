"""Alter a saved session in many ways, and open each: nothing altered is used unnoticed.

    python -m tests.fuzz.sessions [--count 1000] [--seed 1]

Prints a line for each alteration and one of JSON at the end; exits with 1 if one was used without a
word, crashed, or made this program allocate more than the session's own size. Takes minutes: not
collected by pytest.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.altered_sessions import make_place, run, summary


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    started, told = time.monotonic(), []
    luck = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as place:
        make_place(Path(place))
        for one in run(Path(place), [luck.randrange(2**32) for _ in range(given.count)]):
            told.append(one)
            print(json.dumps(one), flush=True)
    measured = {"seed": given.seed, **summary(told), "seconds": round(time.monotonic() - started)}
    print(json.dumps(measured))
    return 1 if measured["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
