"""What each of many recipes costs a model: size, perplexity, divergence from the source.

    python convert/compare.py starter pride_and_prejudice.txt --calibration emma.txt

Converts the model by each recipe into a temporary folder, compares it with the source on the text,
and removes it.
"""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from mlx_stream.cli.convert import (
    Calibration,
    GroupSize,
    ReportTokens,
    named_text,
    print_report,
    run_script,
)
from mlx_stream.cli.report import print_json
from mlx_stream.cli.terminal import guarded, note, progress_bar

RECIPES = [f"uniform_{bits}" for bits in (8, 6, 5, 4, 3)] + ["mixed_4_6", "sensitive_4_6"]


@guarded
def compare(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="What `mlx_stream convert` takes.")],
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The text file to compare on.")],
    recipe: Annotated[
        list[str] | None,
        typer.Option("--recipe", help=f"May be given often. Default: {', '.join(RECIPES)}."),
    ] = None,
    group_size: GroupSize = None,
    calibration: Calibration = None,
    report_tokens: ReportTokens = 4_096,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print what each recipe costs MODEL, measured on TEXT."""
    from mlx_stream.checkpoint.recipes import recipe_named
    from mlx_stream.conversion import Options, convert_model

    texts = {"report": named_text(text), "calibration": named_text(calibration)}
    recipes = [recipe_named(name, group_size) for name in recipe or RECIPES]
    rows = []
    for one in recipes:
        needed = texts if one.rule == "sensitive" else {"report": texts["report"]}
        options = Options(recipe=one, report_tokens=report_tokens, **needed)
        note(f"converting by {one.name}")
        with tempfile.TemporaryDirectory() as folder:
            result = convert_model(model, Path(folder) / one.name, options, note, progress_bar)
        lost = result.about["report"]["kl_mean"]
        note(f"{one.name}: {result.about['tensor_bytes']:,} bytes, KL {lost:.4f}")
        rows.append((model, one.name, result.about))
    if json:
        print_json({"model": model, "recipes": [about for _, _, about in rows]})
    else:
        print_report(rows)


if __name__ == "__main__":
    run_script(compare)
