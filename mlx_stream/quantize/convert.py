"""Converts a source to a folder: completes the recipe, writes the folder, reports the cost.

The folder is written by `write_converted`, which does not run a model.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_stream.checkpoint import Checkpoint
from mlx_stream.checkpoint.other_quantizers import in_mlx_bits
from mlx_stream.checkpoint.write import CONVERSION, refuse_taken, replace_json
from mlx_stream.config import read_config
from mlx_stream.errors import MemoryRefused, TextError, ValueRefused
from mlx_stream.evaluate.corpus import Corpus, encode
from mlx_stream.evaluate.divergence import compare
from mlx_stream.evaluate.sensitivity import measure_sensitivity
from mlx_stream.generate.model import Model, megabytes
from mlx_stream.generate.token_stream import TokenStream
from mlx_stream.hub.resolve import resolve
from mlx_stream.load import (
    explain_dequantized,
    load,
    named_dtype,
    naming,
    read_checkpoint,
    stored_dtype,
)
from mlx_stream.models.layout import layout_of, matrix_bytes
from mlx_stream.plan import devices
from mlx_stream.plan.inspect import summarize_model
from mlx_stream.plan.memory import NOT_QUANTIZED
from mlx_stream.plan.planner import PlanRequest, make_plan
from mlx_stream.program.notices import Notify, discard
from mlx_stream.quantize.conversion import WIDEST
from mlx_stream.quantize.recipes import DEFAULT_GROUP, Recipe, allocate_bits, uniform_recipe
from mlx_stream.quantize.write_converted import (
    ConversionResult,
    bytes_per_token,
    refuse_places,
    write_converted,
)
from mlx_stream.text.tokenizer import Tokenizer

# The stream that a report uses.
SINKS, WINDOW = 4, 1_020
REPORT_TOKENS = 4_096
# With fewer tokens, the 99th percentile would be a single token.
LEAST_TOKENS = 200

Progress = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


@contextmanager
def quietly(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show no progress."""
    yield lambda done, total: None


@dataclass(frozen=True)
class ConvertOptions:
    """How to convert.

    Attributes:
        recipe, dtype: see `prepare_conversion`.
        calibration: name and text used to measure a sensitive recipe.
        report: name and text used to compare the result with the source.
        report_tokens: how many tokens of that text are read.
        force: replace the folder of an earlier conversion.
    """

    recipe: Recipe | None = None
    dtype: str | None = None
    calibration: tuple[str, str] | None = None
    report: tuple[str, str] | None = None
    report_tokens: int = REPORT_TOKENS
    force: bool = False


def convert_model(
    source: str,
    out: Path,
    options: ConvertOptions,
    notify: Notify = discard,
    progress: Progress = quietly,
) -> ConversionResult:
    """Convert a folder, a Hub id, a `.gguf` file or `starter` to the folder `out`.

    Only a `sensitive_*` recipe or a report needs to run the model, with all of it in memory.
    Otherwise memory use does not grow with the size of the model.

    Raises:
        ValueRefused: the options are mutually exclusive, or `out` is taken.
        TextError: a text is too short.
        SourceError, CheckpointError, TokenizerError: see `mlx_stream.errors`.
    """
    check_options(options)
    refuse_taken(out, options.force)
    path = resolve(source, notify)
    refuse_places(path, out)
    with naming(source, path):
        found = read_checkpoint(path)
        target = named_dtype(options.dtype) or stored_dtype(found)
        checkpoint = in_mlx_bits(found, target)
        config = read_config(checkpoint.config)
    if checkpoint is not found and (options.report or options.calibration):
        raise ValueRefused(
            "--report and --calibration need to run the source, but a model in its format can only "
            "be converted: convert it without them first, and use the result"
        )
    del found  # it would keep the tensors alive
    text = options.report and report_text(checkpoint, options)
    recipe = options.recipe
    if recipe is not None and (config.quantization is not None or checkpoint.dequantized):
        notify("the source is already quantized: this adds to its error")
    elif checkpoint.dequantized and options.dtype is None:
        numbers = sum(
            at.outputs * at.inputs
            for at in layout_of(config).matrices
            if at.path in checkpoint.dequantized
        )
        size = megabytes(matrix_bytes(numbers, WIDEST, 2))
        notify(
            f"{explain_dequantized(checkpoint)} {WIDEST.bits} bits in groups of "
            f"{WIDEST.group_size}: {size}"
        )
    if recipe is not None and options.calibration is not None:
        recipe = calibrate(path, recipe, options.calibration, notify, progress)
    # Read before the conversion takes the tensors out of the checkpoint.
    sizes = {name: checkpoint.tensors[name].nbytes for name in checkpoint.tensors if text}
    with naming(source, path, out), progress("converting") as tell:
        result = write_converted(checkpoint, out, recipe, options.dtype, options.force, tell)
    if result.unquantized:
        count, first = len(result.unquantized), result.unquantized[0]
        notify(
            f"{count} matrices stay as they are: their rows cannot be divided into groups of "
            f"{recipe and recipe.base.group_size} ({first})"
        )
    if text:
        before = {
            "tensor_bytes": sum(sizes.values()),
            "bytes_per_token": bytes_per_token(config, sizes),
        }
        with progress("comparing") as tell:
            found = compare_with_source(path, out, text, tell)
        result.about["report"] = {**found, "source": before}
        replace_json(result.about, out / CONVERSION)
    return result


def recipe_for(
    source: str, device: str, group_size: int | None, notify: Notify = discard
) -> Recipe | None:
    """Return the recipe with the most bits that fits on a device; None if the source itself does.

    Raises:
        DeviceError: there is no such device.
        MemoryRefused: the model does not fit on the device at any number of bits.
        ValueRefused, SourceError, CheckpointError: as for `convert_model`.
    """
    place = devices.find(device)
    asked = PlanRequest(group_size=DEFAULT_GROUP if group_size is None else group_size)
    chosen = make_plan(summarize_model(source, notify), place, asked, notify)
    if chosen.missing:
        raise MemoryRefused(
            f"{source} does not fit {place.title}, even as {chosen.recipe.name}: it needs "
            f"{chosen.missing / 1e6:,.1f} MB more; see mlx_stream plan"
        )
    notify(f"for {place.title}: {chosen.recipe.name}, with a window of {chosen.window:,}")
    bits = chosen.recipe.bits
    return None if bits in (None, NOT_QUANTIZED) else uniform_recipe(bits, asked.group_size)


def check_options(options: ConvertOptions) -> None:
    """Reject options that conflict, before anything is fetched or read."""
    sensitive = options.recipe is not None and options.recipe.rule == "sensitive"
    if sensitive and options.calibration is None:
        raise ValueRefused(
            f"--recipe {options.recipe and options.recipe.name} is measured on a text: give one "
            "with --calibration"
        )
    if options.calibration is not None and not sensitive:
        raise ValueRefused("--calibration is for measured recipes: sensitive_...")
    if options.report_tokens <= LEAST_TOKENS:
        raise ValueRefused(
            f"--report-tokens must be above {LEAST_TOKENS}, not {options.report_tokens}"
        )


def report_text(checkpoint: Checkpoint, options: ConvertOptions) -> Corpus:
    assert options.report is not None
    text = encode(Tokenizer.from_checkpoint(checkpoint), [options.report])
    if len(text.ids) <= LEAST_TOKENS:
        raise TextError(
            f"{options.report[0]}: {len(text.ids)} tokens: a report needs more than {LEAST_TOKENS}"
        )
    return replace(text, ids=text.ids[: options.report_tokens])


def calibrate(
    path: Path,
    recipe: Recipe,
    text: tuple[str, str],
    notify: Notify,
    progress: Progress,
) -> Recipe:
    """Complete a recipe by measuring which parts of a model suffer most at its base bits."""
    model = load(path, keep_quantized=False, notify=notify)
    ids = model.tokenizer.encode(text[1])
    with progress("measuring sensitivity") as tell:
        harm = measure_sensitivity(model, ids, recipe.base, tell)
    elements = {
        at.path: at.outputs * at.inputs
        for at in layout_of(model.config).matrices
        if at.inputs % recipe.base.group_size == 0
    }
    del model
    mx.clear_cache()
    return allocate_bits(recipe, elements, harm)


def compare_with_source(
    source: Path, result: Path, text: Corpus, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Read a text with both models and return how far the result diverges from the source."""
    before, after = (stream_of(load(path)) for path in (source, result))
    found = compare(before, after, text.ids.tolist(), progress=progress)
    return {"text": text.digest, "sinks": SINKS, "window": WINDOW, **found}


def stream_of(model: Model) -> TokenStream:
    # The trained context may be shorter; a sliding window limits both models equally.
    window = min(WINDOW, model.config.max_position_embeddings - SINKS)
    return TokenStream(model, model.new_cache(SINKS, window))
