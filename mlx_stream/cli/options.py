"""Options that several verbs share, declared once; independent of the verbs.

Options that are always given together are a group: a dataclass. A verb takes it as one
keyword-only argument, and the command line shows its fields.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from mlx_stream.program.exits import exits_cleanly, notify

if TYPE_CHECKING:
    from mlx_stream.generate.model import Model
    from mlx_stream.sampling import Sampling

ModelArgument = Annotated[
    str, Argument(metavar="MODEL", help="A folder, a Hub id, a .gguf file, or starter.")
]
DefaultModelArgument = Annotated[
    str | None,
    Argument(
        metavar="MODEL",
        help="A folder, a Hub id, a .gguf file, or starter. Default: the config file's, else "
        "the starter.",
        show_default=False,
    ),
]
Dtype = Annotated[
    str | None,
    Option(
        help="Compute in float32, float16 or bfloat16. Default: the checkpoint's own type on "
        "Metal, float32 elsewhere."
    ),
]
KeepQuantized = Annotated[
    bool | None,
    Option(
        "--keep-quantized/--dequantize",
        help="Compute with quantized weights as they are, or dequantize them. "
        "Default: keep on Metal, dequantize on the CPU backend.",
        show_default=False,
    ),
]
Force = Annotated[
    bool, Option("--force", help="Load even if weights and ring exceed the device's memory.")
]
Sinks = Annotated[int | None, Option(help="Number of initial tokens to never evict. Default: 4.")]
KvBits = Annotated[
    int | None,
    Option(help="Bits for the window's keys and values: 8 or 4. The sinks are not quantized."),
]
Devices = Annotated[
    Path | None,
    Option(
        "--devices",
        help="TOML file with your own devices. Default: the one in your configuration folder.",
    ),
]
MaxTokens = Annotated[int, Option(help="Maximum tokens to generate.")]
ShowStats = Annotated[bool, Option("--stats", help="Print statistics to standard error.")]
Yes = Annotated[bool, Option("--yes", help="Do not ask for confirmation.")]
AsJson = Annotated[bool, Option("--json", help="Print one JSON object to standard output.")]


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen, in the order of `Sampling`."""

    temp: Annotated[
        float | None,
        Option(
            help="Temperature, from 0 to 5; 0 takes the likeliest token. Default: the config "
            "file's, else 0.6."
        ),
    ] = None
    top_k: Annotated[int, Option(help="Keep the k likeliest tokens; 0 keeps all.")] = 0
    top_p: Annotated[
        float, Option(help="Keep the likeliest tokens that add up to this probability.")
    ] = 0.9
    min_p: Annotated[
        float, Option(help="Keep tokens at least this fraction as likely as the top one.")
    ] = 0.0
    repetition_penalty: Annotated[
        float, Option(help="Repetition penalty; values above 1 make attended tokens less likely.")
    ] = 1.0
    seed: Annotated[int | None, Option(help="Random seed. Default: a new one each run.")] = None

    def as_sampling(self) -> "Sampling":
        from mlx_stream.cli.config_file import setting
        from mlx_stream.sampling import Sampling

        temperature = setting("temperature") if self.temp is None else self.temp
        default = Sampling.temperature
        return Sampling(default if temperature is None else temperature, *astuple(self)[1:])


@dataclass(frozen=True)
class ReplyOptions:
    """When a reply stops, and how its tokens are guessed."""

    stop: Annotated[
        list[str] | None, Option(help="Text at which to stop; it is not printed. Repeatable.")
    ] = None
    speculate: Annotated[
        bool | None,
        Option(
            "--speculate/--no-speculate",
            help="Guess tokens from earlier text and verify several at once. The output is the "
            "same, and repetitive text is generated faster. Default: yes, unless --kv-bits, --seed "
            "or --session is given.",
            show_default=False,
        ),
    ] = None
    draft: Annotated[
        str | None,
        Option(
            help="Smaller model with the same vocabulary, also used for guessing. The output is "
            "the same."
        ),
    ] = None


@dataclass(frozen=True)
class ThinkingOptions:
    """Whether and how a model thinks before it answers."""

    think: Annotated[
        bool | None,
        Option(
            "--think/--no-think",
            help="Turn thinking on or off, for a model that can think. "
            "Default: set by its template.",
            show_default=False,
        ),
    ] = None
    reasoning_effort: Annotated[
        str | None,
        Option(
            help="How long to think: a level that the model's template defines, such as low or "
            "high."
        ),
    ] = None
    hide_thinking: Annotated[
        bool, Option("--hide-thinking", help="Do not show the model's thinking.")
    ] = False


@dataclass(frozen=True)
class WindowOptions:
    """What a stream attends to."""

    window: Annotated[
        int | None,
        Option(
            help="Number of recent tokens to attend to. Default: 2,048, or what fits the trained "
            "context. In a chat with a model that thinks: up to 32,764, if memory allows."
        ),
    ] = None
    sinks: Sinks = None
    kv_bits: KvBits = None


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded."""

    dtype: Dtype = None
    keep_quantized: KeepQuantized = None
    force: Force = False

    def load(self, model: str | None) -> "Model":
        """Load a model; None means the default model."""
        from mlx_stream.load import load

        model = default_model() if model is None else model
        return load(model, self.dtype, self.keep_quantized, self.force, notify)


@dataclass(frozen=True)
class MeasuredLoadOptions:
    """How a model is loaded for measurements: in float32 and dequantized by default."""

    dtype: Annotated[str, Option(help="Compute in float32, float16 or bfloat16.")] = "float32"
    keep_quantized: KeepQuantized = False
    force: Force = False

    def load(self, model: str | None) -> "Model":
        return LoadOptions(self.dtype, self.keep_quantized, self.force).load(model)


def default_model() -> str:
    """Return the model set in the environment or in the config file, or else the starter."""
    from mlx_stream.cli.config_file import setting
    from mlx_stream.hub.starter import STARTER

    return setting("model") or STARTER


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """Turn a function into a command, which may take groups of options and exits cleanly.

    With `sampling: SamplingOptions`, the command line has --temp, --top-k and so on, and the
    function gets one SamplingOptions. Its arguments must be keyword-only.
    """
    groups: dict[str, Any] = {}
    shown: list[inspect.Parameter] = []
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        if is_dataclass(parameter.annotation):
            groups[parameter.name] = parameter.annotation
            parts = inspect.signature(groups[parameter.name], eval_str=True).parameters.values()
            shown += [part.replace(kind=inspect.Parameter.KEYWORD_ONLY) for part in parts]
        else:
            shown.append(parameter)

    @functools.wraps(function)
    def run(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        function(**given)

    run.__dict__["__signature__"] = inspect.Signature(shown)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    return exits_cleanly(run)
