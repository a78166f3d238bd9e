"""Options that several verbs share, declared once; knows no verb."""

from pathlib import Path
from typing import Annotated

import typer

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
    int | None, typer.Option("--seed", help="Of the random numbers. Default: another each time.")
]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", help="End before this text; may be given several times."),
]
ShowStats = Annotated[bool, typer.Option("--stats", help="Print statistics to standard error.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object to standard output.")]
