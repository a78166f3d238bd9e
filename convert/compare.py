"""Compares recipes on a model by size, perplexity and divergence from the source.

    python convert/compare.py starter pride_and_prejudice.txt --calibration emma.txt

Converts the model with each recipe into a temporary folder, and evaluates it on the text. Prints a
Markdown table or, with --json, the reports.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from typing import Any

RECIPES = [f"uniform_{bits}" for bits in (8, 6, 5, 4, 3)] + ["mixed_4_6"]
MEASURED = "sensitive_4_6"


def report(model: str, text: str, recipe: str, calibration: str | None, tokens: int) -> Any:
    """Return the output of `mlx_stream convert --json` for one recipe."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "mlx_stream", "convert", model, f"{folder}/{recipe}"]
        command += ["--recipe", recipe, "--report", text, "--report-tokens", str(tokens), "--json"]
        if recipe.startswith("sensitive") and calibration:
            command += ["--calibration", calibration]
        done = subprocess.run(command, stdout=subprocess.PIPE)
    if done.returncode:
        sys.exit(done.returncode)  # the command has already printed the reason
    return json.loads(done.stdout)


def row(name: str, about: dict[str, Any], found: dict[str, Any]) -> str:
    cells = [name, f"{about['bits_per_weight']:.2f}", f"{about['tensor_bytes'] / 1e6:.1f}"]
    cells += [f"{found['perplexity']:.2f}", f"{found['kl_mean']:.4f}", f"{found['kl_p99']:.3f}"]
    return " | ".join([*cells, f"{found['top1_agreement']:.1%}"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Print how much worse each recipe makes a model.")
    parser.add_argument("model", help="folder, Hub id, .gguf file, or starter")
    parser.add_argument("text", help="text file to compare on")
    parser.add_argument("--recipe", action="append", help="a recipe; repeatable")
    parser.add_argument("--calibration", metavar="TEXT", help=f"text to measure {MEASURED} on")
    parser.add_argument("--report-tokens", type=int, default=4_096, help="tokens to compare on")
    parser.add_argument("--json", action="store_true", help="print JSON")
    asked = parser.parse_args()
    names = asked.recipe or [*RECIPES, *([MEASURED] if asked.calibration else [])]
    found = []
    for name in names:
        about = report(asked.model, asked.text, name, asked.calibration, asked.report_tokens)
        print(f"{name}: KL {about['report']['kl_mean']:.4f}", file=sys.stderr, flush=True)
        found.append(about)
    if asked.json:
        print(json.dumps({"model": asked.model, "recipes": found}))
        return
    print("recipe | bits | MB | perplexity | KL mean | KL p99 | top-1 same")
    print("--- | --- | --- | --- | --- | --- | ---")
    source = found[0]["report"]["source"]["tensor_bytes"] / 1e6
    print(f"source | | {source:.1f} | {found[0]['report']['source_perplexity']:.2f} | | |")
    for name, about in zip(names, found, strict=True):
        print(row(name, about, about["report"]))


if __name__ == "__main__":
    main()
