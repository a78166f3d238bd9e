"""`mlx_stream show`: a model's kind and size, its window, and what its chat template supports."""

from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument

from mlx_stream.cli import options
from mlx_stream.errors import MlxStreamError, SourceError, one_line
from mlx_stream.program.escape import escape
from mlx_stream.program.exits import notify

if TYPE_CHECKING:
    from pathlib import Path

    from mlx_stream.chat.prompts import PromptBuilder
    from mlx_stream.config import Quantization

SYSTEM_PLACES = {
    "turn": "a turn of its own, pinned",
    "question": "the beginning of the first question, pinned",
    "exchange": "a made-up first exchange, pinned",
}


@options.verb
def show(
    *,
    model: Annotated[
        str | None,
        Argument(
            metavar="MODEL",
            help="A folder, a cached Hub id, a .gguf file, or starter. Default: the config file's, "
            "else the starter.",
        ),
    ] = None,
    json: options.AsJson = False,
) -> None:
    """Describe a model on this machine, without loading it."""
    from mlx_stream.cli.report import megabytes, print_aligned, print_json
    from mlx_stream.models.layout import layout_of
    from mlx_stream.models.window import DEFAULT_SINKS, bounded_windows
    from mlx_stream.plan.inspect import local_model, summarize_model

    model = options.default_model() if model is None else model
    path = local_model(model)
    if path is None:
        raise SourceError(
            f"{escape(model)} is not on this machine: `mlx_stream pull {escape(model)}` fetches it"
        )
    summary = summarize_model(model, notify)
    config = summary.config
    (longest,) = bounded_windows(config, DEFAULT_SINKS, (config.max_position_embeddings,))
    template = described_template(path)
    found: dict[str, Any] = {
        "model": model,
        "path": str(path),
        "family": config.model_type,
        "parameters": layout_of(config).parameters,
        "bytes": summary.stored,
        "weights": described((config.quantization or {}).get(""), summary.dtype),
        "trained_context": config.max_position_embeddings,
        "largest_window": longest,
        "template": template,
    }
    if json:
        print_json(found)
        return
    lines = found | {
        "parameters": f"{found['parameters']:,}",
        "bytes": f"{megabytes(summary.stored)} MB on disk" if summary.stored else "unknown",
        "trained_context": f"{config.max_position_embeddings:,} tokens",
        "largest_window": f"{longest:,} tokens, and {DEFAULT_SINKS} sinks",
    }
    del lines["template"]
    lines |= {f"template: {name}": text for name, text in template.items()}
    print_aligned(
        [
            (name.replace("_", " ").replace("bytes", "size"), str(value))
            for name, value in lines.items()
        ]
    )


def described(quantization: "Quantization | None", dtype: str) -> str:
    if quantization is None:
        return dtype
    return f"{quantization.bits} bits in groups of {quantization.group_size}, {dtype}"


def described_template(path: "Path") -> dict[str, str]:
    """Return what a chat template supports, by feature."""
    try:
        prompts, own = (read_prompts(path, system) for system in ("Be brief.", None))
    except MlxStreamError as error:
        return {"chat": f"no: {one_line(error)}"}
    if not (prompts and own):
        return {"chat": "no: use generate or score"}
    template = own.template
    system = SYSTEM_PLACES[prompts.system_place]
    if own.pinned:
        system += f"; {len(own.pinned):,} pinned tokens without one"
    settles = "never"
    if template.settles_late:
        settles = "once another exchange follows"
    elif template.rewrites:
        settles = "once the next question follows"
    thinks = f"yes, marked by {template.style.openings[0].strip()}" if template.style else "no"
    return {
        "chat": "yes",
        "system prompt": system,
        "thinks": thinks,
        "tools": described_tools(own),
        "rewrites a reply": settles,
    }


def described_tools(prompts: "PromptBuilder") -> str:
    """Return whether a model may be given tools, or why not."""
    tool = {"type": "function", "function": {"name": "probe", "parameters": {"type": "object"}}}
    try:
        type(prompts)(prompts.tokenizer, prompts.template, None, True, [tool])
    except MlxStreamError as error:
        return f"no: {one_line(error)}"
    return "yes, pinned with the system prompt"


def read_prompts(path: "Path", system: str | None) -> "PromptBuilder | None":
    """Return the builder that encodes conversations with a model; None if it has no template.

    Raises:
        MlxStreamError: its tokenizer or template cannot be used.
    """
    from mlx_stream.chat.prompts import PromptBuilder
    from mlx_stream.load import read_checkpoint
    from mlx_stream.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_checkpoint(read_checkpoint(path))
    if tokenizer.template is None:
        return None
    return PromptBuilder(tokenizer, tokenizer.template, system, pin=True)
