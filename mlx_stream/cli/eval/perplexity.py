"""`mlx_stream eval perplexity`: one text, several caches side by side."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from mlx_stream.cli import options
from mlx_stream.cli.eval import common
from mlx_stream.cli.terminal import progress_bar
from mlx_stream.program.exits import fail, notify

if TYPE_CHECKING:
    from mlx_stream.evaluate.perplexity import Spec

DEFAULT_CACHES = ("dense", "window", "recompute", "stream", "mlx-lm")
COLUMNS = (
    ("cache", "cache", ""),
    ("tokens", "tokens", ","),
    ("perplexity", "perplexity", ",.2f"),
    ("tokens_per_second", "tok/s", ".1f"),
    ("active_bytes", "active MB", "MB"),
    ("peak_bytes", "peak MB", "MB"),
    ("resident_bytes", "resident MB", "MB"),
)


@options.verb
def perplexity(
    *,
    model: options.ModelArgument,
    files: common.Files,
    cache: Annotated[
        list[str] | None,
        Option(
            metavar="NAME[,SETTING=N...]",
            help="stream, fresh (a new stream for each segment, which first reads the "
            "preceding window), window (no sinks), dense, recompute, mlx-lm or llama.cpp; "
            "repeatable. Settings: tokens for all; stride and sinks for recompute, chunk for the "
            "others; "
            "kv (8 or 4 bits) and clock (the limit at which it is lowered) for stream. "
            "Default: dense, window, recompute, stream, mlx-lm.",
        ),
    ] = None,
    against: Annotated[list[str] | None, Option(help="Also measure mlx-lm or llama.cpp.")] = None,
    gguf: Annotated[
        Path | None, Option(help="The same model as a .gguf file, for llama.cpp.")
    ] = None,
    window: common.Window = 1_020,
    sinks: common.Sinks = 4,
    tokens: common.Tokens = 8_192,
    segment: common.Segment = 2_048,
    loading: options.MeasuredLoadOptions,
    output: common.OutputOptions,
) -> None:
    """Compare the perplexity of caches of the same size.

    Speed and memory are measured too.

    The caches read the text one after another. All except dense hold sinks + window tokens. mlx-lm
    gets rotating caches that keep as many initial tokens as sinks. Perplexity is measured
    per segment; an incomplete last segment is not read. fresh's speed includes reading the
    preceding window.
    """
    from mlx_stream.evaluate import llamacpp, mlx_lm
    from mlx_stream.evaluate.perplexity import (
        DEFAULTS,
        PEERS,
        Setting,
        Spec,
        check_settings,
        measure_perplexity,
    )
    from mlx_stream.evaluate.report import Report, facts
    from mlx_stream.hub.resolve import resolve

    output.check()
    specs = [parse_spec(one) for one in cache or DEFAULT_CACHES]
    if not cache:  # a small window needs a small stride
        stride = max(1, min(DEFAULTS["stride"], sinks + window))
        specs = [Spec(s.name, {"stride": stride}) if s.name == "recompute" else s for s in specs]
    for peer in against or ():
        if peer not in PEERS:
            fail(f"--against must be one of {', '.join(PEERS)}, not {peer!r}")
        if peer not in (spec.name for spec in specs):
            specs.append(Spec(peer))
    loaded = loading.load(model)
    folder = resolve(model, notify)
    if gguf is None and folder.is_file():
        gguf = folder
    if gguf is not None and not os.path.isfile(gguf):  # noqa: PTH113  (any name will do)
        fail(f"{gguf}: no such file")
    if gguf not in (None, folder) and all(spec.name != "llama.cpp" for spec in specs):
        fail("--gguf is for llama.cpp: add --against llama.cpp, or leave out --gguf")
    absent = {
        "llama.cpp": llamacpp.why_not(gguf),
        "mlx-lm": mlx_lm.why_no_peer(folder),
    }
    notes = [
        f"{s.label}: not measured, because {absent[s.name]}" for s in specs if absent.get(s.name)
    ]
    specs = [spec for spec in specs if not absent.get(spec.name)]
    sinks, window = loaded.resolve_window(sinks, window, notify)
    text = common.read_texts(loaded, files)
    setting = Setting(loaded, folder, text, sinks, window, tokens, segment, gguf)
    check_settings(setting, specs)
    for line in notes:
        notify(line)
    with progress_bar("reading") as progress:
        rows, cut = common.collecting_rows(measure_perplexity(setting, specs, progress))
    labels = [spec.label for spec in specs]
    sizes = {"sinks": sinks, "window": window, "segment": segment}
    about = facts(loaded, texts=text.names, **sizes, caches=labels)
    output.publish(Report("perplexity", about, rows, notes), COLUMNS, cut=cut)


def parse_spec(text: str) -> "Spec":
    """Parse the description of a cache given with `--cache`."""
    from mlx_stream.evaluate.perplexity import SETTINGS, Spec

    name = text.split(",")[0]
    if name not in SETTINGS:
        fail(f"--cache must be one of {', '.join(SETTINGS)}, not {name!r}")
    name, settings = common.parse_cache(text, ("tokens", *SETTINGS[name]))
    if settings.get("kv", 8) not in (8, 4):
        fail(f"--cache {text}: kv must be 8 or 4")
    return Spec(name, settings)
