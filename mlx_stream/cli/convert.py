"""`mlx_stream convert`: another size or type of a model, as a folder of mlx-lm's layout."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_stream.cli import options
from mlx_stream.cli.terminal import progress_bar, read_text
from mlx_stream.program.exits import exits_cleanly, fail, notify

if TYPE_CHECKING:
    from mlx_stream.quantize.recipes import Recipe
    from mlx_stream.quantize.write_converted import ConversionResult

Source = Annotated[
    str, typer.Argument(metavar="SOURCE", help="A folder, a Hub id, a .gguf file, or starter.")
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write: a new one.")]
GroupSize = Annotated[
    int | None,
    typer.Option("--group-size", help="Weights that share a scale: 32, 64 or 128. Default: 64."),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="TYPE",
        help="float32, float16 or bfloat16: of scales and of what is not quantized; without "
        "--bits of everything, quantized weights included. Default: the source's.",
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option("--calibration", metavar="TEXT", help="What a sensitive recipe is measured on."),
]
Report = Annotated[
    str | None,
    typer.Option(
        "--report", metavar="TEXT", help="Compare source and result on this text file afterwards."
    ),
]
ReportTokens = Annotated[
    int, typer.Option("--report-tokens", help="How much of that text is read, in tokens.")
]
Force = Annotated[
    bool, typer.Option("--force", help="Replace OUT if it is what an earlier conversion wrote.")
]


@exits_cleanly
def convert(
    source: Source,
    out: Out,
    bits: Annotated[
        int | None, typer.Option("--bits", help="Of every weight: 2, 3, 4, 5, 6 or 8.")
    ] = None,
    group_size: GroupSize = None,
    mode: Annotated[
        str | None,
        typer.Option("--mode", help="affine, mxfp4, mxfp8 or nvfp4. Default: affine."),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            metavar="NAME",
            help="Instead of --bits: mixed_2_6, mixed_3_4, mixed_3_6 or mixed_4_6 (mlx-lm's), "
            "sensitive_3_6, sensitive_4_6 or sensitive_4_8 (measured on --calibration).",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option("--device", help="Instead of --bits: the most that fit this device."),
    ] = None,
    dtype: Dtype = None,
    calibration: Calibration = None,
    report: Report = None,
    report_tokens: ReportTokens = 4_096,
    force: Force = False,
    json: options.AsJson = False,
) -> None:
    """Write a model to the folder OUT: quantized, or as it is.

    --bits, --mode, --recipe and --device quantize it. The folder appears when it is whole. Memory
    does not grow with the model, but for a sensitive recipe and a report, which run it.
    """
    from mlx_stream.cli.report import print_json
    from mlx_stream.quantize.convert import ConvertOptions, convert_model, recipe_for

    if device is None:
        chosen = choose(bits, group_size, mode, recipe)
    elif (bits, mode, recipe) == (None, None, None):
        chosen = recipe_for(source, device, group_size, notify)
    else:
        fail("--device chooses the bits itself: leave out --bits, --mode and --recipe")
    asked = ConvertOptions(
        recipe=chosen,
        dtype=dtype,
        calibration=named_text(calibration),
        report=named_text(report),
        report_tokens=report_tokens,
        force=force,
    )
    result = convert_model(source, out, asked, notify, progress_bar)
    if json:
        print_json(as_json(result))
    else:
        print_result(source, out, result)


def choose(
    bits: int | None, group_size: int | None, mode: str | None, name: str | None
) -> "Recipe | None":
    """Return the recipe that these options ask for; none if none of them is given."""
    from mlx_stream.quantize.recipes import (
        DEFAULT_GROUP,
        check_quantization,
        recipe_named,
        uniform_recipe,
    )

    if name is not None:
        if bits is not None or mode is not None:
            fail("--recipe says bits and mode itself: leave out --bits and --mode")
        return recipe_named(name, group_size)
    if mode not in (None, "affine"):
        recipe = recipe_named(mode) if mode in ("mxfp4", "mxfp8", "nvfp4") else None
        if recipe is None:
            fail(f"--mode must be one of affine, mxfp4, mxfp8, nvfp4, not {mode!r}")
        base = recipe.base
        check_quantization(
            base.bits if bits is None else bits,
            base.group_size if group_size is None else group_size,
            base.mode,
        )
        return recipe
    if bits is not None:
        return uniform_recipe(bits, DEFAULT_GROUP if group_size is None else group_size)
    if mode is not None or group_size is not None:
        fail("--group-size and --mode affine need --bits: how many?")
    return None


def named_text(path: str | None) -> tuple[str, str] | None:
    return None if path is None else (path, read_text(path))


def as_json(result: "ConversionResult") -> dict[str, Any]:
    return {
        **result.about,
        "files": result.files,
        "not_quantized": result.unquantized,
        "peak_bytes": result.peak_bytes,
        "bound_bytes": result.bound_bytes,
        "resident_bytes": result.resident_bytes,
    }


def print_result(source: str, out: Path, result: "ConversionResult") -> None:
    about = result.about
    files = "1 file" if result.files == 1 else f"{result.files} files"
    print(
        f"{out}: {about['recipe'] or 'not quantized'}, {about['bits_per_weight']:.2f} bits per "
        f"weight, {megabytes(about['tensor_bytes'])} MB in {files}"
    )
    where = "within" if result.peak_bytes <= result.bound_bytes else "above"
    print(
        f"memory: {megabytes(result.peak_bytes)} MB at peak, {where} the bound of "
        f"{megabytes(result.bound_bytes)} MB (three of the largest matrix, and the largest file); "
        f"the process grew by {megabytes(result.resident_bytes)} MB"
    )
    if about["report"]:
        print_report(source, out.name, about)


def print_report(source: str, name: str, about: dict[str, Any]) -> None:
    """Print how far a result is from its source."""
    from mlx_stream.cli.report import print_table

    found = about["report"]
    columns = ["", "bits", "MB", "MB read a token", "perplexity", "KL mean", "KL p99", "top-1 same"]
    first = [source, "", *figures(found["source"]), f"{found['source_perplexity']:.3f}", "", "", ""]
    result = [name, f"{about['bits_per_weight']:.2f}", *figures(about)]
    result += [f"{found['perplexity']:.3f}", f"{found['kl_mean']:.4f}", f"{found['kl_p99']:.3f}"]
    print_table(columns, [first, [*result, f"{found['top1_agreement']:.1%}"]])


def figures(about: dict[str, Any]) -> list[str]:
    return [megabytes(about["tensor_bytes"]), megabytes(about["bytes_per_token"])]


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f}"
