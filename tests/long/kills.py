"""Kill a scripted chat with SIGKILL at random moments, and inspect what is left each time.

    python -m tests.long.kills [--kills 300] [--migrations 100] [--seed 1]

Kills migrations of a version 1 transcript first. Prints a line for each kill of a chat and one of
JSON at the end; exits with 1 if a committed turn or a question was lost, a session did not open or
verify, or no kill fell into a migration, a reply, a commit or a snapshot. Takes minutes: not
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

from mlx_stream.load import load
from tests.fakes.killed_chat import Kills
from tests.fakes.tiny import write_model
from tests.fakes.version_1 import kill_migrations


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--migrations", type=int, default=100)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        migrations = kill_migrations(Path(place), given.migrations, random.Random(given.seed))
        print(dict(migrations), flush=True)
        os.environ["MLX_STREAM_HOME"] = str(Path(place) / "home")
        folder = write_model(Path(place) / "model")
        model = load(folder, dtype="float32", keep_quantized=False)
        kills = Kills(model, folder, random.Random(given.seed))
        for number in range(given.kills):
            print(kills.kill(number), flush=True)
        kills.end()
    measured = {
        "seed": given.seed,
        "migrations_left": dict(migrations),
        "kills": given.kills,
        "fell_in": dict(kills.fell),
        "sessions": len(kills.said),
        "turns_committed": kills.committed,
        "read_again": kills.reread,
        "only_asked": kills.unanswered,
        "seconds": round(time.monotonic() - started),
    }
    print(json.dumps(measured))
    hit = all(kills.fell[phase] for phase in ("reply", "commit", "snapshot"))
    return 0 if hit and migrations["old"] and migrations["new"] else 1


if __name__ == "__main__":
    sys.exit(main())
