"""Options that several verbs share, declared once; knows no verb.

Options that are always given together are a group: a dataclass. A verb marked `grouped` takes
it as one keyword-only argument, and the command line shows its fields.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_stream.program.exits import notify

if TYPE_CHECKING:
    from mlx_stream.load import Model
    from mlx_stream.sampling import Sampling

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A folder, a Hub id, a .gguf file, or starter.", show_default=True
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="TYPE",
        help="Compute in float32, float16 or bfloat16. Default: the checkpoint's own on Metal, "
        "else float32.",
    ),
]
KeepQuantized = Annotated[
    bool | None,
    typer.Option(
        "--keep-quantized/--dequantize",
        help="Compute with quantized weights as they are, or dequantize them. "
        "Default: keep on Metal, dequantize on the CPU backend.",
        show_default=False,
    ),
]
Force = Annotated[
    bool,
    typer.Option("--force", help="Load even if weights and ring exceed the device's memory."),
]
Sinks = Annotated[
    int | None, typer.Option("--sinks", help="First tokens that never leave. Default: 4.")
]
Window = Annotated[
    int | None,
    typer.Option(
        "--window",
        help="Latest tokens attended. Default: 2,048, or what the trained context leaves.",
    ),
]
KvBits = Annotated[
    int | None,
    typer.Option(
        "--kv-bits",
        help="Keep the window's keys and values in 8 or 4 bits; the first tokens' stay whole.",
    ),
]
Speculate = Annotated[
    bool | None,
    typer.Option(
        "--speculate/--no-speculate",
        help="Guess tokens from what was read and verify several at once: the same text, faster "
        "where it repeats itself. Default: yes, unless --kv-bits, --seed or --session is given.",
        show_default=False,
    ),
]
Draft = Annotated[
    str | None,
    typer.Option(
        "--draft",
        metavar="MODEL",
        help="A smaller model of the same vocabulary that guesses too; the text stays the same.",
    ),
]
Devices = Annotated[
    Path | None,
    typer.Option(
        "--devices",
        metavar="FILE",
        help="A TOML file of your own devices, in place of the one in your configuration.",
    ),
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", help="Longest text to write, in tokens.")]
Temp = Annotated[float, typer.Option("--temp", help="Temperature; 0 takes the likeliest token.")]
TopK = Annotated[int, typer.Option("--top-k", help="Keep the k likeliest tokens; 0 keeps all.")]
TopP = Annotated[
    float, typer.Option("--top-p", help="Keep the likeliest tokens of this joint probability.")
]
MinP = Annotated[
    float, typer.Option("--min-p", help="Keep tokens this fraction as likely as the likeliest.")
]
RepetitionPenalty = Annotated[
    float,
    typer.Option("--repetition-penalty", help="Above 1, attended tokens become less likely."),
]
Seed = Annotated[
    int | None, typer.Option("--seed", help="Random seed. Default: a new one each run.")
]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", help="End before this text; may be given several times."),
]
ShowStats = Annotated[bool, typer.Option("--stats", help="Print statistics to standard error.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object to standard output.")]
Files = Annotated[
    list[str],
    typer.Argument(metavar="FILE...", help="Text files, read one after another; - is stdin."),
]
Segment = Annotated[int, typer.Option("--segment", help="Tokens of a segment.")]
Tokens = Annotated[int, typer.Option("--tokens", help="Tokens of the text to read.")]
Chunk = Annotated[int, typer.Option("--chunk", help="Tokens read per step.")]
# With defaults of an experiment's own.
WindowSize = Annotated[int, typer.Option("--window", help="Latest tokens attended.")]
SinkCount = Annotated[int, typer.Option("--sinks", help="First tokens that never leave.")]
MeasuredDtype = Annotated[
    str, typer.Option("--dtype", metavar="TYPE", help="Compute in float32, float16 or bfloat16.")
]
AsCsv = Annotated[bool, typer.Option("--csv", help="Print the rows as CSV.")]
Plot = Annotated[
    Path | None,
    typer.Option(
        "--plot", metavar="FILE", help="Draw a .png or .svg, and its dark twin FILE-dark."
    ),
]


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen."""

    temp: Temp = 0.6
    top_k: TopK = 0
    top_p: TopP = 0.9
    min_p: MinP = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    seed: Seed = None

    def as_sampling(self) -> "Sampling":
        from mlx_stream.sampling import Sampling

        return Sampling(*(getattr(self, field.name) for field in fields(self)))


@dataclass(frozen=True)
class WindowOptions:
    """What a stream attends to."""

    window: Window = None
    sinks: Sinks = None
    kv_bits: KvBits = None


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded."""

    dtype: Dtype = None
    keep_quantized: KeepQuantized = None
    force: Force = False

    def load(self, model: str) -> "Model":
        from mlx_stream.load import load

        return load(model, self.dtype, self.keep_quantized, self.force, notify)


@dataclass(frozen=True)
class MeasuredLoadOptions:
    """How a model is loaded to be measured: in float32 and dequantized, unless asked otherwise."""

    dtype: MeasuredDtype = "float32"
    keep_quantized: KeepQuantized = False
    force: Force = False

    def load(self, model: str) -> "Model":
        return LoadOptions(self.dtype, self.keep_quantized, self.force).load(model)


def grouped(verb: Callable[..., None]) -> Callable[..., None]:
    """Let a verb take groups of options; its arguments must be keyword-only.

    With `sampling: SamplingOptions` the command line has --temp, --top-k and so on, and the verb
    gets one SamplingOptions.
    """
    groups: dict[str, Any] = {}
    shown: list[inspect.Parameter] = []
    for parameter in inspect.signature(verb, eval_str=True).parameters.values():
        if is_dataclass(parameter.annotation):
            groups[parameter.name] = parameter.annotation
            parts = inspect.signature(groups[parameter.name], eval_str=True).parameters.values()
            shown += [part.replace(kind=inspect.Parameter.KEYWORD_ONLY) for part in parts]
        else:
            shown.append(parameter)

    @functools.wraps(verb)
    def run(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        verb(**given)

    run.__dict__["__signature__"] = inspect.Signature(shown)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    return run
