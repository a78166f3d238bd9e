"""Runs `mlx_stream convert` with a preset.

python convert/presets.py phone SOURCE OUT [--calibration TEXT]
python convert/presets.py laptop SOURCE OUT
"""

import argparse
import subprocess
import sys


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Convert a model with a preset.",
        epilog="Other options are those of `mlx_stream convert` and override the preset's.",
    )
    parser.add_argument("preset", help="phone or laptop")
    asked, given = parser.parse_known_args()
    verb = [sys.executable, "-m", "mlx_stream", "convert", "--preset", asked.preset]
    sys.exit(subprocess.run([*verb, *given]).returncode)


if __name__ == "__main__":
    main()
