"""`mlx_stream convert`: write a model, quantized or in another type, in mlx-lm's folder layout."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from mlx_stream.cli import options
from mlx_stream.cli.report import megabytes, print_json, print_table, print_text
from mlx_stream.cli.terminal import progress_bar, read_text
from mlx_stream.errors import MlxStreamError, one_line
from mlx_stream.program.exits import fail, notify

if TYPE_CHECKING:
    from mlx_stream.quantize.recipes import Recipe
    from mlx_stream.quantize.write_converted import ConversionResult


@options.verb
def convert(
    *,
    source: Annotated[
        str, Argument(metavar="SOURCE", help="A folder, a Hub id, a .gguf file, or starter.")
    ],
    out: Annotated[Path, Argument(metavar="OUT", help="The new folder to write.")],
    bits: Annotated[int | None, Option(help="Bits per weight: 2, 3, 4, 5, 6 or 8.")] = None,
    group_size: Annotated[
        int | None, Option(help="Weights that share a scale: 32, 64 or 128. Default: 64.")
    ] = None,
    mode: Annotated[
        str | None, Option(help="affine, mxfp4, mxfp8 or nvfp4. Default: affine.")
    ] = None,
    recipe: Annotated[
        str | None,
        Option(
            help="Instead of --bits: mixed_2_6, mixed_3_4, mixed_3_6 or mixed_4_6 (mlx-lm's), "
            "sensitive_3_6, sensitive_4_6 or sensitive_4_8 (measured on --calibration)."
        ),
    ] = None,
    preset: Annotated[
        str | None,
        Option(
            help="phone (4 bits in float16; with --calibration, 6 bits where they are needed) or "
            "laptop (6 bits). Other options override it."
        ),
    ] = None,
    device: Annotated[
        str | None, Option(help="Instead of --bits: use the most bits that fit this device.")
    ] = None,
    dtype: Annotated[
        str | None,
        Option(
            help="float32, float16 or bfloat16: the type of the scales and of everything that is "
            "not quantized. Without --bits it applies to all weights, even quantized ones. "
            "Default: the source's."
        ),
    ] = None,
    calibration: Annotated[
        str | None, Option(help="Calibration text file for a sensitive recipe.")
    ] = None,
    report: Annotated[
        str | None, Option(help="Text file for comparing the result with the source.")
    ] = None,
    report_tokens: Annotated[
        int, Option(help="Number of tokens to read from --report's text.")
    ] = 4_096,
    force: Annotated[
        bool, Option("--force", help="Replace OUT if an earlier conversion wrote it.")
    ] = False,
    json: options.AsJson = False,
) -> None:
    """Write a model to the folder OUT, quantized or unchanged.

    --bits, --mode, --recipe, --preset and --device quantize it. The folder appears when complete.
    Memory use does not grow with the model's size, unless a sensitive recipe or a report runs the
    model.
    """
    from mlx_stream.hub.listing import record_converted
    from mlx_stream.quantize.convert import ConvertOptions, convert_model, recipe_for
    from mlx_stream.quantize.recipes import preset_named

    if preset is not None:
        found = preset_named(preset)
        dtype = dtype or found.dtype
        if (bits, mode, recipe, device) == (None, None, None, None):
            recipe = found.recipe_for(calibration)
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
    try:
        record_converted(out)
    except (MlxStreamError, OSError) as error:  # the conversion itself has succeeded
        notify(f"`mlx_stream ls` will not list {out}: {one_line(error)}")
    if json:
        print_json(as_json(result))
    else:
        print_result(source, out, result)


def choose(
    bits: int | None, group_size: int | None, mode: str | None, name: str | None
) -> "Recipe | None":
    """Return the recipe that these options ask for, or None if none of them is given."""
    from mlx_stream.quantize import recipes

    if name is not None:
        if bits is not None or mode is not None:
            fail("--recipe sets bits and mode itself: leave out --bits and --mode")
        return recipes.recipe_named(name, group_size)
    if mode in ("mxfp4", "mxfp8", "nvfp4"):
        recipe = recipes.recipe_named(mode)
        base = recipe.base
        recipes.check_quantization(
            base.bits if bits is None else bits,
            base.group_size if group_size is None else group_size,
            base.mode,
        )
        return recipe
    if mode not in (None, "affine"):
        fail(f"--mode must be one of affine, mxfp4, mxfp8, nvfp4, not {mode!r}")
    if bits is not None:
        size = recipes.DEFAULT_GROUP if group_size is None else group_size
        return recipes.uniform_recipe(bits, size)
    if mode is not None or group_size is not None:
        fail("--group-size and --mode affine need --bits: add it")
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
    kept = about["source_quantized"] and about["dtype"] is None
    recipe = about["recipe"] or ("as stored" if kept else "not quantized")
    print_text(
        f"{out}: {recipe}, {about['bits_per_weight']:.2f} bits per weight, "
        f"{megabytes(about['tensor_bytes'])} MB in {files}"
    )
    where = "within" if result.peak_bytes <= result.bound_bytes else "above"
    print_text(
        f"memory: {megabytes(result.peak_bytes)} MB at peak, {where} the bound of "
        f"{megabytes(result.bound_bytes)} MB (3 times the largest matrix plus the largest file); "
        f"the process grew by {megabytes(result.resident_bytes)} MB"
    )
    if found := about["report"]:
        columns = ["", "bits", "MB", "MB read per token", "perplexity"]
        lost = [f"{found['kl_mean']:.4f}", f"{found['kl_p99']:.3f}"]
        lost.append(f"{found['top1_agreement']:.1%}")
        bits = f"{about['bits_per_weight']:.2f}"
        print_table(
            [*columns, "KL mean", "KL p99", "top-1 same"],
            [
                [*figures(source, "", found["source"], found["source_perplexity"]), "", "", ""],
                [*figures(out.name, bits, about, found["perplexity"]), *lost],
            ],
        )


def figures(name: str, bits: str, about: dict[str, Any], perplexity: float) -> list[str]:
    sizes = [megabytes(about[key]) for key in ("tensor_bytes", "bytes_per_token")]
    return [name, bits, *sizes, f"{perplexity:.3f}"]
