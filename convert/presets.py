"""Runs `mlx_stream convert` with the options of a preset.

    python convert/presets.py phone SOURCE OUT [--calibration TEXT]
    python convert/presets.py laptop SOURCE OUT

`phone`: 4 bits, and float16, which every phone's GPU supports. With a calibration text the
embedding, the head and the most sensitive parts get 6 bits, in no more bytes than 5 bits for all.
`laptop`: 6 bits. Further options are those of `mlx_stream convert` and override the preset's.
"""

import argparse
import subprocess
import sys

PHONE, LAPTOP = ["--bits", "4", "--dtype", "float16"], ["--bits", "6"]
PHONE_CALIBRATED = ["--recipe", "sensitive_4_6", "--dtype", "float16"]


def options_of(preset: str, given: list[str]) -> list[str]:
    """Return a preset's options, then the given ones; a given `--bits` replaces the preset's."""
    if preset == "laptop":
        chosen = LAPTOP
    else:
        chosen = PHONE_CALIBRATED if "--calibration" in given else PHONE
    return [*(chosen[2:] if "--bits" in given else chosen), *given]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Convert a model with a preset.",
        epilog="Other options are passed to `mlx_stream convert`.",
    )
    parser.add_argument("preset", choices=["phone", "laptop"], help="the preset")
    parser.add_argument("source", help="folder, Hub id, .gguf file, or starter")
    parser.add_argument("out", help="new folder to write")
    asked, given = parser.parse_known_args()
    verb = [sys.executable, "-m", "mlx_stream", "convert", asked.source, asked.out]
    sys.exit(subprocess.run([*verb, *options_of(asked.preset, given)]).returncode)


if __name__ == "__main__":
    main()
